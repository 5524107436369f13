"""Examines a dataset before training: what training would refuse, drop or never learn, and why. `reports` draws it."""
