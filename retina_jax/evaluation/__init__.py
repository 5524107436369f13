"""COCO scores, the analysis of errors, and pictures with boxes."""
