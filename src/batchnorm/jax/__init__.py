"""Batch norm for JAX: pure functions, fast on a CPU, under every transformation."""

from batchnorm.configuration import import_error

if error := import_error(__name__, "jax"):
    raise error

from batchnorm.jax.averaging import partition, running_average
from batchnorm.jax.functional import batch_norm
from batchnorm.jax.implicit import implicit_batch_norm

__all__ = ["batch_norm", "implicit_batch_norm", "partition", "running_average"]
