"""Checks of how well a reward model tells responses apart, for `shiftrm diagnose`."""
