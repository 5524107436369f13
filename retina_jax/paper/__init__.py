"""The paper's numbers, and its tables and figures computed from your own runs."""
