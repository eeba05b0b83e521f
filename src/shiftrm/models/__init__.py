"""Text to tokens, rewards at positions, shared prefixes, scoring and sampling.

Import `rendering`, `scoring.Scorer` and `sampling` from here.
"""
