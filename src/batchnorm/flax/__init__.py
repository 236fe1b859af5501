"""Batch norm for Flax: `linen.BatchNorm` and `nnx.BatchNorm`, as Flax's own are made, called and stored."""

from batchnorm.flax import linen, nnx

__all__ = ["linen", "nnx"]
