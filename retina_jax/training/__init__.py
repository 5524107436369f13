"""Training: optimizer, state, the pure step, the driver (jit or pmap), checkpoints, metrics."""
