"""Quantizers of keys and values: centering, signs, learned bases, levels, and the codec file."""
