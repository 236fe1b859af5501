"""Benchmarks of batch norm against the speed of memory and other implementations; run with `python -m benchmarks`."""
