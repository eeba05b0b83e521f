"""Blinded comparisons by human raters: sheets, keys and results."""
