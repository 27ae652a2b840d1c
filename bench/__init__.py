"""Benchmarks of hjepa_fast against what a user would pick instead: `python -m bench.run --help`."""
