"""Learning over processes."""
