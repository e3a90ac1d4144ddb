"""Packed keys back to numbers, for prefill."""
