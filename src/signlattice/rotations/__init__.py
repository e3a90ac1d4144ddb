"""Rotations: drawn from a seed, fitted in closed form, or learned; and keys to try them on."""
