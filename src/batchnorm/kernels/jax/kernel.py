"""The interface of the C++ kernels for JAX's arrays, built on the primitives of `primitives`."""

import math
from functools import partial
from numbers import Real

import jax
import jax.numpy as jnp
from jax import lax

from batchnorm.core.dtypes import FLOATS, Array, cast, dtype_name
from batchnorm.core.masks import Lengths, Mask, as_boolean_mask
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import Statistics, effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels import generic
from batchnorm.kernels.generic import Cache, Gradients
from batchnorm.kernels.jax import lowering, primitives
from batchnorm.kernels.jax.devices import normalize_across
from batchnorm.kernels.jax.formulas import CrossDevice, Rule, match_varying, to_operand
from batchnorm.kernels.jax.primitives import backward_p, forward_p
from batchnorm.kernels.jax.running import advance
from batchnorm.kernels.native import different_dtypes
from batchnorm.spec import Activation, Operands, Spec

lowering.register()


class JAX:
    """The kernel for JAX's arrays. It never declines: calls that no primitive supports fall back to `generic`."""

    def normalize(
        self,
        spec: Spec,
        operands: Operands,
        running: RunningStatistics,
        training: bool | Array,
        out: None = None,
        across: CrossDevice | None = None,
    ) -> tuple[Array, RunningStatistics]:
        """Implement `functional.batch_norm`; for a traced `training`, only the selected branch is computed.

        `across` is the axis of devices or lanes along which the batch is sharded.
        """
        x, convention = operands.x, spec.convention
        if not isinstance(training, bool):  # both branches must return a state that varies over devices as x does
            running = running._replace(**dict(zip(running._fields, match_varying(*running, x), strict=False)))
            branches = (
                partial(self.normalize, spec, operands, running, value, None, across) for value in (True, False)
            )
            return lax.cond(training, *branches)  # type: ignore[no-any-return]
        if not training or not has_kernel(spec, operands):
            return generic.normalize(spec, operands, running, training, None, across)
        rule = Rule(convention.eps, named(spec.activation), convention.masked_output == "normalized")
        gamma, beta = effective_gamma(jnp, operands.gamma, convention, x), effective_beta(operands.beta, convention)
        views = to_lncs(operands._replace(gamma=gamma, beta=beta), spec)
        if across is None:
            y, mean, mean_lo, m2, _, count = forward_p.bind(*match_varying(*views), rule=rule)
            batch = Moments(count, mean, m2, mean_lo)
        else:
            y, batch = normalize_across(across, views, rule)
        batch = Moments(*(jnp.reshape(value, spec.axes.statistics_shape(x.shape)) for value in batch))
        return y.reshape(x.shape), advance(running, batch, convention, masked=operands.mask is not None)

    def forward(
        self, spec: Spec, operands: Operands, running: RunningStatistics | None = None, out: None = None
    ) -> tuple[Array, Cache]:
        """Implement `functional.forward`."""
        if running is not None:
            return generic.forward(spec, operands, running)
        generic.register_spec_with_jax()
        x, shape = operands.x, spec.axes.statistics_shape(operands.x.shape)
        results = primitives.forward(to_lncs(operands, spec), Rule(spec.convention.eps, named(spec.activation), False))
        mean, mean_lo, rstd, count = (jnp.reshape(results[i], shape) for i in (1, 2, 4, 5))
        return results.y.reshape(x.shape), Cache(*operands, Statistics(mean, mean_lo, rstd), count, spec)

    def gradients(self, dy: Array, cache: Cache) -> Gradients:
        """Implement `functional.backward`."""
        if cache.count is None:
            return generic.gradients(dy, cache)
        spec, arguments, views = cache.spec, cache.operands[:4], to_lncs(cache.operands, cache.spec)
        channels = (views[0].shape[0], views[0].shape[2])
        by_channel = (jnp.reshape(array, channels) for array in (cache.count, *cache.statistics))
        dy = cast(jnp, dy, cache.x.dtype).reshape(views[0].shape)
        rule = Rule(spec.convention.eps, named(spec.activation), False)
        results = backward_p.bind(*match_varying(dy, *views, *by_channel), rule=rule)
        return Gradients(*(None if a is None else r.reshape(a.shape) for a, r in zip(arguments, results, strict=True)))

    def moments(self, spec: Spec, x: Array, mask: Mask) -> Moments:
        """Implement `functional.moments`."""
        return generic.moments(spec, x, mask)

    def unsupported_reason(self, spec: Spec, operands: Operands, others: tuple[Array | None, ...]) -> str | None:
        """Why the kernels do not support these arrays; None if they do."""
        for array in (*operands[:4], *others):
            if array is not None and (not isinstance(array, jax.Array) or dtype_name(array.dtype) not in FLOATS):
                return f"a {type(array).__name__} of {getattr(array, 'dtype', 'no dtype')} is not an array of JAX"
            if array is not None and any(axes is not None for axes in jax.typeof(array).sharding.spec):
                return "an array is sharded over the axes of a mesh"
        if operands.x.size == 0:
            return "x has no elements"
        return different_dtypes(operands.x, operands.residual, *others) or spec.unsupported


KERNEL = JAX()


def has_kernel(spec: Spec, operands: Operands) -> bool:
    """Whether the primitives implement the convention's training on this batch."""
    convention = spec.convention
    normalization = (convention.normalize_with, convention.eps_train, convention.normalize_correction)
    if normalization != ("batch", "inside", 0) or not isinstance(convention.eps, Real):  # a traced eps
        return False
    has_rule = convention.single in ("identity", "running")
    return not (has_rule and (operands.mask is not None or spec.axes.elements(operands.x.shape) <= 1))


def named(activation: Activation | None) -> str | None:
    """The name of the activation; None for the identity."""
    assert not callable(activation)
    return None if activation == "identity" else activation


def to_lncs(operands: Operands, spec: Spec) -> list[Array]:
    """Reshape a primitive's operands: x and residual (L, N, C, S) or (L, N, C), gamma and beta (L, C), the mask."""
    (x, gamma, beta, residual, mask), axes = operands, spec.axes
    shape, begin = x.shape, int(axes.has_lanes)
    own = axes.channel_axes[begin:]
    first, last = (own[0], own[-1] + 1) if own else (len(shape), len(shape))
    lanes = shape[0] if begin else 1
    L, N, C, S = (lanes, *(math.prod(shape[a:b]) for a, b in ((begin, first), (first, last), (last, len(shape)))))
    inner = () if S == 1 else (S,)
    if isinstance(mask, Lengths) and axes.reduced[:2] == (begin, last) and first == begin + 1 and inner:
        # The batch is N, and time is the first axis of S. Traced lengths have not been checked: clip them.
        lengths = jnp.clip(mask.values, 0, shape[last]).astype(jnp.int32) * (S // shape[last])
        keep: Array | None = jnp.broadcast_to(lengths, (L, N))
    else:
        keep = as_boolean_mask(jnp, mask, x, axes)
        if keep is not None:
            # Expanded to the sizes of x, except along the channels if it is the same for all of them.
            per_channel = any(keep.shape[axis] != 1 for axis in own)
            expanded = tuple(1 if axis in own and not per_channel else size for axis, size in enumerate(shape))
            keep = jnp.broadcast_to(keep, expanded).reshape(L, N, C if per_channel else 1, *inner)
    parameters = (None if array is None else array.reshape(L, C) for array in (gamma, beta))
    x, residual = (None if array is None else array.reshape(L, N, C, *inner) for array in (x, residual))
    return [to_operand(array) for array in (x, *parameters, residual, keep)]
