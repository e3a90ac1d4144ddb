"""A cache for ``generate()`` that stores bits: its layers, masks and storage."""
