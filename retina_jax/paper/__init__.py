"""The paper's numbers, and its tables and figures made again from runs of one's own."""
