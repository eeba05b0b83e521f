"""Measures of reward models and policies: discrimination, diversity, win rates, benchmarks."""
