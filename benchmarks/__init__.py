"""Benchmarks: each is run as a module, `python -m benchmarks.<name>`."""
