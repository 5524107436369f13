"""A detector in one file, for machines that have jax and numpy and nothing of this package."""
