"""Normalization of a batch that is sharded over a named axis of a mesh, `pmap` or `vmap`, by the kernels."""

import jax.numpy as jnp
from jax import lax

from batchnorm.convention import MaskedOutput
from batchnorm.core import activations
from batchnorm.core.dtypes import Array, cast
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import rstd_of_var
from batchnorm.kernels.generic import masked_values
from batchnorm.kernels.jax import primitives
from batchnorm.kernels.jax.formulas import CrossDevice, Rule, from_operand, mask_of


def normalize_across(across: CrossDevice, operands: list[Array], rule: Rule) -> tuple[Array, Moments]:
    """y of a part of the batch, and the moments (L, C) of the whole batch.

    Kernels compute the reductions, here and in the derivatives. The elementwise operations are left to XLA, which fuses
    them: x is read twice and y written once, as by the kernel for one device.
    """
    x, gamma, beta, residual, keep = operands
    _, mean, mean_lo, m2, _, count = primitives.forward(operands, rule._replace(has_output=False))
    whole = across.merge(Moments(count, mean, m2, mean_lo))
    n = jnp.maximum(whole.count, 1).astype(mean.dtype)
    scale = rstd_of_var(jnp, whole.m2 / n, rule.eps, "inside")
    scale = scale if from_operand(gamma) is None else scale * cast(jnp, gamma, scale.dtype)
    # hi and lo are constants. The derivative of the mean flows through `offset`, where its terms have the value 0.
    hi, lo = lax.stop_gradient(whole.mean), lax.stop_gradient(whole.mean_lo)
    offset = -scale * ((whole.mean - hi) + (whole.mean_lo - lo))
    offset = offset if from_operand(beta) is None else offset + cast(jnp, beta, scale.dtype)
    mask = mask_of(keep, x)
    masked_output: MaskedOutput = "normalized" if rule.normalizes_padding else "zero"
    z = primitives.spread(offset, scale, x, keep, hi, lo, normalizes_padding=rule.normalizes_padding)
    if from_operand(residual) is not None:
        z = z + cast(jnp, masked_values(jnp, residual, mask, masked_output), z.dtype)
    y = activations.apply(jnp, z, rule.activation)
    y = jnp.where(mask, y, 0.0) if mask is not None and not rule.normalizes_padding else y
    return cast(jnp, y, x.dtype), whole
