"""A reward model for domains nobody labelled: tasks of domains, meta-test and its baselines."""
