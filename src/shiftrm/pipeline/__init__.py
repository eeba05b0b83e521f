"""Whole experiments: an engine of resumable stages, jobs, and the plan that joins them."""
