"""Ways to adapt a reward model to the responses of today's policy."""
