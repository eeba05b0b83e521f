"""Measures of reward models and policies: discrimination, diversity, win rates, benchmarks.

Pure functions on numbers and rows, and the files they are read from.
"""
