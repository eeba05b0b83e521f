"""Methods for adapting a reward model to the responses of the current policy."""
