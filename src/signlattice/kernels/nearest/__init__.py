"""The nearest point of a lattice that is not a cube."""
