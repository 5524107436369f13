"""COCO scores, error analysis, and pictures with boxes."""
