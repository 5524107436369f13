"""Sweeps: named points over a base config, each trained once, on any number of machines and restarts."""
