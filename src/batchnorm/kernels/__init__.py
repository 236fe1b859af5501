"""The kernels: one implementation for each array library, selected by `registry`."""
