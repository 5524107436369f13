"""The page of a single run: what was run, how it learned, what it finds, and what it gets wrong."""
