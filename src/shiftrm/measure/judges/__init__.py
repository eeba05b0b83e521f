"""Judges of two responses: models on a server, reward models, the gold reward."""
