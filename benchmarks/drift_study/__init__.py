"""The study of the drift monitor in the gold world; see benchmarks/drift_monitor.py."""
