"""The free signals, one file for each kind."""
