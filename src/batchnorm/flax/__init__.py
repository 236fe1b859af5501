"""Batch norm for Flax: `linen.BatchNorm` and `nnx.BatchNorm` with Flax's constructors, calls and variables."""

from batchnorm.configuration import import_error

if error := import_error(__name__, "jax") or import_error(__name__, "flax"):
    raise error

from batchnorm.flax import linen, nnx
from batchnorm.flax.insertion import with_batch_norm
from batchnorm.flax.interception import Report, replaced
from batchnorm.flax.replacement import replace, restore

__all__ = ["Report", "linen", "nnx", "replace", "replaced", "restore", "with_batch_norm"]
