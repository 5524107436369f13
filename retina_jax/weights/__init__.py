"""Weights from other systems, read without torch and without running code from the file."""
