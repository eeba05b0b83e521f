"""Who compares two responses: models behind a server, reward models, the gold reward."""
