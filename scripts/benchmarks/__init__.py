"""The work that `scripts/benchmark.py` measures, for this project and its peers, each in its own process."""
