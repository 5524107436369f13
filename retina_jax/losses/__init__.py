"""Losses (Sections 3 and 4.1): classification, box regression, mining, and the sum over an image."""
