"""What `scripts/benchmark.py` measures: this project and its peers, in turn, each in a process of its own."""
