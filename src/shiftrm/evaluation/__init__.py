"""Does the reward model still tell responses apart, and is the policy better? Pure functions."""
