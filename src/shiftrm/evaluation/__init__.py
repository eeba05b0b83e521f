"""Does the reward model still tell responses apart, and is the policy better?

Pure functions on numbers, except `scored_files`, which reads files and asks a model for rewards.
"""
