"""Attention of one new token on packed keys: a definition, and one implementation a device."""
