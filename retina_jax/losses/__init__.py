"""Losses (Sections 3 and 4.1): of the classes, of the boxes, and their sum over an image."""
