"""The orthogonal polar factor of small matrices."""
