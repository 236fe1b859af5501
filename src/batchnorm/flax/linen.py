"""The batch norm of `flax.linen`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.module import compact, merge_param

from batchnorm.convention import Convention
from batchnorm.flax.implicit_linen import ImplicitBatchNorm
from batchnorm.flax.layer import (
    Arrays,
    LayerCall,
    apply_batch_norm,
    canonical_dtype,
    check_shapes,
    initial_value,
    is_complex,
    variable_names,
)
from batchnorm.flax.options import (
    Own,
    as_groups,
    check_complex,
    checked_axis,
    checked_number,
    checked_options,
    normalized_axes,
    with_numbers,
)
from batchnorm.spec import Activation

__all__ = ["BatchNorm", "ImplicitBatchNorm"]


class BatchNorm(linen.BatchNorm):
    """Drop-in `flax.linen.BatchNorm`, several times faster on CPUs, with activation, residual, lengths and conventions.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)

    Attributes, variables (`params`: scale, bias; `batch_stats`: mean, var) and results are those of Flax's layer, so
    that checkpoints load either way. Differences from Flax's layer:

    - Variances do not cancel: `use_fast_variance` has no effect.
    - A batch that is empty, fully masked or has non-finite statistics leaves the running statistics unchanged.
    - With `axis_name`, the parts of the batch are weighted by their numbers of unmasked elements.
    - NaN in padding does not reach any gradient.

    Another convention changes what its record specifies. `batch_stats` then stores the tracked quantity under its name
    (`std`, `std_eps`, `rstd`, `var_eps` or `log10_std`) in place of `var`, and `steps` and `weight` if needed. Complex
    input is computed by Flax and does not support the options below that Flax's layer lacks.

    Args:
        axis: Channel axis, or several; None is the convention's, the last axis for `flax`.
        momentum: Weight of the old value in the running statistics, a number or an array; None is the convention's,
            0.99 for `flax`.
        epsilon: Added to the variance, a number or an array; None is the convention's, 1e-5 for `flax`. The attributes
            store the resolved numbers, so that `clone(convention=...)` keeps them.
        activation: A name supported by `batchnorm.jax.batch_norm`, or a callable.
        convention: The system to reproduce: a name in `batchnorm.CONVENTIONS` or a `Convention`.
        kernel: `native` (C++) or `agnostic` (the generic implementation); None is the best available.
        count_skipped: Whether `batch_stats` counts skipped batches in `skipped`.

    All other arguments are those of `flax.linen.BatchNorm`.

    Raises:
        ValueError, TypeError: At construction, for an unknown activation, convention or kernel, an axis that is not an
            integer, a momentum outside of 0 to 1, or a negative epsilon.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from batchnorm.flax import linen
        >>> layer, x = linen.BatchNorm(momentum=0.9, activation="relu"), jnp.asarray([[1.0, 10.0], [3.0, 30.0]])
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
        >>> y, state = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        >>> y.round(3).tolist(), state["batch_stats"]["mean"].round(3).tolist()
        ([[0.0, 0.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """

    axis: Any = None
    momentum: Any = None
    epsilon: Any = None
    activation: Activation | None = None
    convention: str | Convention = "flax"
    kernel: str | None = None
    count_skipped: bool = False

    def __post_init__(self) -> None:
        convention = options_of(self).convention
        self.axis = checked_axis(convention.axis if self.axis is None else self.axis)
        self.momentum = convention.decay if self.momentum is None else self.momentum
        self.epsilon = convention.eps if self.epsilon is None else self.epsilon
        for name in ("momentum", "epsilon"):
            checked_number(name, getattr(self, name))
        super().__post_init__()

    @compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        lengths: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Apply batch norm; `batchnorm.jax.batch_norm` describes mask, lengths and residual.

        Initialization updates no statistics, and `axis_name` need not exist then.
        """
        if has_complex_numbers(self, x):
            check_complex(options_of(self), lengths=lengths, residual=residual)
            y: jax.Array = super().__call__(x, use_running_average, mask=mask)
            return y
        return normalize(self, x, use_running_average, mask=mask, lengths=lengths, residual=residual)


def options_of(layer: linen.BatchNorm) -> Own:
    """Validate the options that Flax's layer lacks; for a layer of Flax's own, return their defaults."""
    if not isinstance(layer, BatchNorm):
        return Own()
    return checked_options(layer.activation, layer.convention, layer.kernel, layer.count_skipped)


def has_complex_numbers(layer: linen.BatchNorm, x: jax.Array) -> bool:
    """Whether the input, a dtype or the stored mean of a layer is complex."""
    mean: Any = layer.get_variable("batch_stats", "mean")
    own = None if mean is None else mean.dtype
    return is_complex(jnp.result_type(x), layer.dtype, layer.param_dtype, own)


def normalize(
    layer: linen.BatchNorm,
    x: jax.Array,
    use_running_average: bool | None,
    *,
    mask: jax.Array | None = None,
    lengths: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Apply a linen batch norm, ours or Flax's own, to x, and update its variables."""
    training = not merge_param("use_running_average", layer.use_running_average, use_running_average)
    x = jnp.asarray(x)
    axes = normalized_axes(layer.axis, x.ndim)
    shape = tuple(x.shape[axis] for axis in axes)
    epsilon, epsilon_array = checked_number("epsilon", layer.epsilon)
    momentum, momentum_array = checked_number("momentum", layer.momentum)
    own = with_numbers(options_of(layer), epsilon, momentum)
    is_initializing = layer.is_initializing()

    stored_dtype = jnp.float32 if layer.force_float32_reductions else layer.param_dtype
    names = variable_names(own)
    variables = {
        field: layer.variable("batch_stats", name, initial_value, own, field, shape, stored_dtype)
        for name, field in names.items()
    }
    state = {field: variable.value for field, variable in variables.items()}
    check_shapes(layer, x, axes, {name: state[field] for name, field in names.items() if field in ("mean", "spread")})
    scale = layer.param("scale", layer.scale_init, shape, layer.param_dtype) if layer.use_scale else None
    bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype) if layer.use_bias else None

    given = [array for array in (x, scale, bias) if array is not None]
    call = LayerCall(
        training, axes, canonical_dtype(layer.dtype, *given),
        updated_dtype(layer, x, state["mean"], momentum_array), own,
        axis_name=None if is_initializing else layer.axis_name,
        axis_index_groups=None if is_initializing else as_groups(layer.axis_index_groups),
        single="clamp" if is_initializing and own.convention.single == "error" else None,
    )  # fmt: skip
    y, updated = apply_batch_norm(
        call, Arrays(x, scale, bias, state, mask, lengths, residual, epsilon_array, momentum_array)
    )
    if (training or own.convention.update == "always") and not is_initializing:
        for field, variable in variables.items():
            variable.value = updated[field]
    return y


def updated_dtype(layer: linen.BatchNorm, x: jax.Array, mean: jax.Array, momentum: jax.Array | None) -> Any:
    """The dtype of Flax's running update, promoted from the old value, the batch's statistics and `momentum`."""
    computed = x.dtype if layer.dtype is None else layer.dtype
    if layer.force_float32_reductions or not jnp.issubdtype(computed, jnp.inexact):
        computed = jnp.promote_types(computed, jnp.float32)
    return jnp.result_type(mean.dtype, computed, *(() if momentum is None else (momentum,)))
