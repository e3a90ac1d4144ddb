"""One-bit keys for the KV cache of a transformer: rotate, keep the signs, attend."""

__version__ = "0.1.0"
