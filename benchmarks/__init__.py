"""What is fast and exact enough, measured: `python -m benchmarks.NAME` from the root of the repository."""
