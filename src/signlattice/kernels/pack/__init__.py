"""Keys to packed signs and scales."""
