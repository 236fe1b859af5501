"""The interface of the C++ kernels for JAX's arrays, by the primitives of `jax_primitives`."""

import math
from functools import partial
from numbers import Real

import jax
import jax.numpy as jnp
from jax import lax

from batchnorm.convention import Convention
from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import FLOATS, Array, cast, dtype_name
from batchnorm.core.masks import Lengths, Mask, elementwise
from batchnorm.core.moments import Moments
from batchnorm.core.normalize import Statistics, effective_beta, effective_gamma
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels import agnostic, jax_lowering, jax_primitives, jax_running, launch
from batchnorm.kernels.agnostic import ActivationLike, Cache, Gradients
from batchnorm.kernels.jax_devices import normalize_across
from batchnorm.kernels.jax_formulas import Across, Rule, aligned, stand_in
from batchnorm.kernels.jax_primitives import backward_p
from batchnorm.kernels.operands import has_members

jax_lowering.register()

PLAIN_TYPES: set[type] = set()  # calls are compiled: nothing is gained before their checks


def refusal(
    large: tuple[Array | None, ...], small: tuple[Array | None, ...], axes: Axes, activation: ActivationLike
) -> str | None:
    """Why the kernels do not serve these arrays; None if they do."""
    for array in large + small:
        if array is not None and (not isinstance(array, jax.Array) or dtype_name(array.dtype) not in FLOATS):
            return f"a {type(array).__name__} of {getattr(array, 'dtype', 'no dtype')} is not an array of JAX"
        if array is not None and any(axes is not None for axes in jax.typeof(array).sharding.spec):
            return "an array is cut up over the axes of a mesh"
    if large[0] is not None and large[0].size == 0:
        return "x has no elements"
    return launch.refusal_of_call(large, axes, activation)


def batch_norm(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    running: RunningStatistics,
    *,
    training: bool | Array,
    axes: Axes,
    convention: Convention,
    mask: Mask,
    activation: str | None,
    residual: Array | None,
    out: Array | None = None,
    across: Across | None = None,
) -> tuple[Array, RunningStatistics]:
    """`functional.batch_norm`, with everything resolved; of a traced `training`, only the branch that it chooses.

    `across` is the axis of devices, or of lanes, along which the batch is spread.
    """
    if not isinstance(training, bool):  # both branches return a state that varies over devices as x does
        running = running._replace(**dict(zip(running._fields, aligned(*running, x), strict=False)))
    compute = partial(
        batch_norm, x, gamma, beta, running, axes=axes, convention=convention, mask=mask, activation=activation,
        residual=residual, out=out, across=across,
    )  # fmt: skip
    if not isinstance(training, bool):
        y, updated = lax.cond(training, partial(compute, training=True), partial(compute, training=False))
        return y, updated
    normalization = (convention.normalize_with, convention.eps_train, convention.normalize_correction)
    has_kernel = normalization == ("batch", "inside", 0) and isinstance(convention.eps, Real)  # not a traced one
    if not training or not has_kernel or launch.leaves_single_elements(x, axes, mask, training, convention):
        return agnostic.batch_norm(*compute.args, **compute.keywords, training=training)
    rule = Rule(convention.eps, named(activation), convention.masked_output == "normalized")
    gamma, beta = effective_gamma(jnp, gamma, convention, x), effective_beta(beta, convention)
    operands = views(x, gamma, beta, residual, mask, axes)
    y, batch = normalize_batch(operands, rule) if across is None else normalize_across(across, operands, rule)
    batch = Moments(*(jnp.reshape(value, axes.statistics_shape(x.shape)) for value in batch))
    updated = jax_running.advance(running, batch, convention, masked=mask is not None)
    return agnostic.deliver(y.reshape(x.shape), out), updated


def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axes: Axes,
    eps: float,
    mask: Mask,
    activation: str | None,
    residual: Array | None,
    out: Array | None = None,
) -> tuple[Array, Cache]:
    """`functional.forward`, with everything resolved."""
    agnostic.register_plan_with_jax()
    operands = views(x, gamma, beta, residual, mask, axes)
    results = jax_primitives.forward(operands, Rule(eps, named(activation), False))
    shape = axes.statistics_shape(x.shape)
    mean, mean_lo, rstd, count = (jnp.reshape(results[i], shape) for i in (1, 2, 4, 5))
    cache = Cache(
        x, gamma, beta, residual, mask, Statistics(mean, mean_lo, rstd), count, launch.plan_of(axes, activation, eps)
    )
    return agnostic.deliver(results.y.reshape(x.shape), out), cache


def backward(dy: Array, cache: Cache) -> Gradients:
    """`functional.backward`."""
    x, gamma, beta, residual, mask, statistics, count, plan = cache
    axes = plan.axes
    operands = views(x, gamma, beta, residual, mask, axes)
    channels = (operands[0].shape[0], operands[0].shape[2])
    per_channel = (jnp.reshape(array, channels) for array in (count, *statistics))
    dy = cast(jnp, dy, x.dtype).reshape(operands[0].shape)
    results = backward_p.bind(*aligned(dy, *operands, *per_channel), rule=Rule(plan.eps, named(plan.activation), False))
    arguments = (x, gamma, beta, residual)
    return Gradients(*(None if a is None else r.reshape(a.shape) for a, r in zip(arguments, results, strict=True)))


def moments(x: Array, axes: Axes, mask: Mask) -> Moments:
    """`functional.moments`, with everything resolved."""
    return agnostic.moments(x, axes, mask)


def normalize_batch(operands: list[Array], rule: Rule) -> tuple[Array, Moments]:
    """y, and the moments (L, C) of the batch."""
    y, mean, mean_lo, m2, _, count = jax_primitives.forward(operands, rule)
    return y, Moments(count, mean, m2, mean_lo)


def named(activation: ActivationLike) -> str | None:
    """The name of the activation, None for one that does nothing."""
    assert not callable(activation)
    return None if activation == "identity" else activation


def views(
    x: Array, gamma: Array | None, beta: Array | None, residual: Array | None, mask: Mask, axes: Axes
) -> list[Array]:
    """The operands of a primitive: (L, N, C, S) or (L, N, C), (L, C), and the mask."""
    shape, begin = x.shape, 1 if has_members(axes) else 0
    own = axes.kept[begin:]
    first, last = (own[0], own[-1] + 1) if own else (len(shape), len(shape))
    lanes = shape[0] if begin else 1
    L, N, C, S = (lanes, *(math.prod(shape[a:b]) for a, b in ((begin, first), (first, last), (last, len(shape)))))
    inner = () if S == 1 else (S,)
    if isinstance(mask, Lengths) and axes.reduced[:2] == (begin, last) and first == begin + 1 and inner:
        # The batch is N, and time leads S. Traced lengths may be anything.
        lengths = jnp.clip(mask.values, 0, shape[last]).astype(jnp.int32) * (S // shape[last])
        keep: Array | None = jnp.broadcast_to(lengths, (L, N))
    else:
        keep = elementwise(jnp, mask, x, axes)
        if keep is not None:
            # As large as x, but for the channels where it is the same for all of them.
            per_channel = any(keep.shape[axis] != 1 for axis in own)
            expanded = tuple(1 if axis in own and not per_channel else size for axis, size in enumerate(shape))
            keep = jnp.broadcast_to(keep, expanded).reshape(L, N, C if per_channel else 1, *inner)
    parameters = (None if array is None else array.reshape(L, C) for array in (gamma, beta))
    x, residual = (None if array is None else array.reshape(L, N, C, *inner) for array in (x, residual))
    return [stand_in(array) for array in (x, *parameters, residual, keep)]
