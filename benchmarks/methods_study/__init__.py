"""The study of ways to adapt a reward model while the policy moves; see `benchmarks/methods.py`."""
