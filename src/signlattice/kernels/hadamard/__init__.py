"""The (randomised) Hadamard transform."""
