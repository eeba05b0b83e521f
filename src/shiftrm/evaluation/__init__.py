"""Does the reward model still tell responses apart, and is the policy better?

Pure functions on numbers, except `scored_files` and `findings`, which ask a model for
rewards.
"""
