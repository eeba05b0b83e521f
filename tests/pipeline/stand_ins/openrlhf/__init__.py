"""Stands in for OpenRLHF, which needs GPUs."""
