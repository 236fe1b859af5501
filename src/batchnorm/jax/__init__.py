"""Batch norm for JAX: pure functions, fast on a CPU, under every transformation."""

from batchnorm.jax.functional import batch_norm
from batchnorm.jax.implicit import implicit_batch_norm, running_average

__all__ = ["batch_norm", "implicit_batch_norm", "running_average"]
