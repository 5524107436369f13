"""Annotations of other tools: read into COCO JSON, and written back from it."""
