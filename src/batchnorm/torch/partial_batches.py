"""Batch norm of one part of a batch by the statistics of the whole batch.

The other parts are in other micro-batches or processes. With dz = activation'(z) * dy and sums over all parts,

    dx = gamma * rstd * (dz - sum(dz)/count - xhat * sum(dz * xhat)/count)

is the sum of a term of this part alone and a term through the statistics, which needs the sums and x.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import array_api_compat.torch as xp
import torch
from torch import Tensor

from batchnorm.core.moments import Moments
from batchnorm.core.normalize import Statistics, xhat_scale
from batchnorm.kernels.generic import Gradients, own_statistics
from batchnorm.kernels.torch import kernel
from batchnorm.spec import Operands, Spec


@dataclass
class MergedBatch:
    """The whole batch: its moments, and the statistics by which every part is normalized."""

    spec: Spec
    moments: Moments
    statistics: Statistics

    @classmethod
    def of(cls, parts: Iterable[Moments], spec: Spec) -> "MergedBatch":
        """Merge the moments of the parts, in the given order.

        Raises:
            ValueError: A channel has a single element, which the convention defines as an error.
        """
        moments = reduce(Moments.merge, parts)
        if spec.convention.single == "error" and bool((moments.count == 1).any()):
            raise ValueError("Expected more than 1 value per channel when training, got one in all parts together")
        return cls(spec, moments, own_statistics(xp, spec, moments))


def partial_gradients(dy: Tensor, part: Operands, merged: MergedBatch) -> tuple[Gradients, Tensor]:
    """The gradients with the statistics held constant, and this part's sums of dz and dz * xhat."""
    x, gamma, beta, *_ = part
    channels = merged.spec.axes.statistics_shape(x.shape)
    one, zero = (torch.full(channels, value, dtype=merge_dtype(x), device=x.device) for value in (1.0, 0.0))
    scale, shift = (own if given is None else given.to(merge_dtype(x)) for given, own in ((gamma, one), (beta, zero)))
    operands = part._replace(gamma=scale, beta=shift)
    dx, dgamma, dbeta, dresidual = kernel.gradients_by(merged.spec, dy, operands, merged.statistics)
    sums = torch.stack([dbeta, dgamma])  # type: ignore[list-item]
    dbeta, dgamma = (
        None if given is None else own.to(given.dtype) for given, own in zip((beta, gamma), sums, strict=True)
    )
    return Gradients(dx, dgamma, dbeta, dresidual), sums


def gradient_through_statistics(part: Operands, merged: MergedBatch, sums: Tensor) -> Tensor:
    """The term of dx through the statistics, from the sums over all parts, in the dtype of the statistics."""
    (x, gamma, _, _, mask), axes, convention = part, merged.spec.axes, merged.spec.convention
    mean, mean_lo, rstd = merged.statistics
    factor = xhat_scale(xp, merged.moments, convention.eps, convention.eps_train, convention.normalize_correction)
    scale = (rstd if gamma is None else gamma.to(rstd.dtype) * rstd) / merged.moments.count.clamp(min=1)
    dbeta, dgamma = sums.to(rstd.dtype)
    slope = dgamma * rstd if factor is None else factor * dgamma * rstd
    deviation = (x.to(mean.dtype) - axes.expand_to_x(xp, mean)) - axes.expand_to_x(xp, mean_lo)
    slope, offset, scale = (axes.expand_to_x(xp, coefficient) for coefficient in (slope, dbeta, -scale))
    dx = scale * torch.addcmul(offset, slope, deviation)
    return dx if mask is None else torch.where(mask, dx, 0.0)  # type: ignore[arg-type]


def merge_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics are exchanged and sums are computed."""
    return torch.float32 if x.device.type == "mps" else torch.float64
