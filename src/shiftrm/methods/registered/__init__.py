"""One file per method; importing it registers the method."""
