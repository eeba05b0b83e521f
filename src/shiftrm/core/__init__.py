"""Losses, the meta step, curvature, the hypergradient and statistics: tensors in, tensors out.

Imports torch and scipy only, and nothing of this package but `errors`.
"""
