"""The gradient of the L1 norm of rotated keys: what the trainer computes at every step."""
