"""How fast batch norm is, against the speed of memory and against everyone else's; run with `python -m benchmarks`."""
