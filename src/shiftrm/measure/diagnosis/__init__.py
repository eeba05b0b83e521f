"""What a reward model still tells apart: the checks behind `shiftrm diagnose`."""
