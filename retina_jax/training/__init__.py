"""Training: optimizer, state, the pure step, its two drivers, checkpoints, and a run's folder."""
