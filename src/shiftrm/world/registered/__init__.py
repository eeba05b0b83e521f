"""One file per gold world; importing it registers the world."""
