"""Thin adapters over TRL and transformers; the mathematics is in `losses` and `meta`."""
