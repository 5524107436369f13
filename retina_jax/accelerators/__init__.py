"""Compiles the programs of training and inference for accelerators that this machine does not have."""
