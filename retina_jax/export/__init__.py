"""Exports a detector to one file that needs jax, numpy and flatbuffers, and loads it."""
