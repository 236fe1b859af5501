"""Batch norm for Flax: `linen.BatchNorm` and `nnx.BatchNorm`, with the constructors, calls and variables of Flax's own."""

from batchnorm.flax import linen, nnx

__all__ = ["linen", "nnx"]
