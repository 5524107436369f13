"""Export of a detector to one file that needs jax and numpy alone."""
