"""What compression costs: perplexity, head by head, through the cache, and in time."""
