"""Blinded comparisons by people: the sheet, its key and what the answers say."""
