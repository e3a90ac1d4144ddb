"""Models: the attention hooks, capture of states, windows of text, loading, and the hub."""
