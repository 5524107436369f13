"""Kernels for XLA's CPU backend. A reader of the method does not need them."""
