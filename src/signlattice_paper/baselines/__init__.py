"""Other people's caches and codes, by their published rules."""
