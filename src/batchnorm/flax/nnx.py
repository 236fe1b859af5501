"""The batch norm of `flax.nnx`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn.dtypes import promote_dtype

from batchnorm.convention import Convention
from batchnorm.flax.implicit_nnx import ImplicitBatchNorm
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
from batchnorm.flax.signatures import OwnSignature, with_options_of
from batchnorm.spec import Activation

__all__ = ["BatchNorm", "ImplicitBatchNorm"]

#: Whether `variable[...] = value` keeps the variable's dtype (Flax 0.12.1 and newer) or adopts the value's.
KEEPS_DTYPE = hasattr(nnx.Variable, "set_value")


class BatchNorm(nnx.BatchNorm):
    """Drop-in `flax.nnx.BatchNorm`, several times faster on CPUs, with activation, residual, lengths and conventions.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)

    Attributes, variables (`Param`: scale, bias; `BatchStat`: mean, var) and results are those of Flax's layer, so that
    checkpoints load either way. `batchnorm.flax.linen.BatchNorm` lists the differences from Flax's layers and the
    variables of other conventions. In nnx, also, evaluation uses the running statistics in float32 whatever `dtype` is.

    Args:
        num_features: Number of channels; for several axes a tuple, by ascending axis.
        activation: A name supported by `batchnorm.jax.batch_norm`, or a callable.
        convention: The system to reproduce: a name in `batchnorm.CONVENTIONS` or a `Convention`.
        kernel: `native` (C++) or `agnostic` (the generic implementation); None is the best available.
        count_skipped: Whether a `BatchStat` named `skipped` counts skipped batches.
        **options: Options of `flax.nnx.BatchNorm`, including `rngs`. `momentum`, `epsilon` and `axis` are the
            convention's if None or omitted; `momentum` and `epsilon` may be arrays.

    Raises:
        ValueError, TypeError: At construction, for an unknown activation, convention or kernel, an axis that is not an
            integer, a momentum outside of 0 to 1, or a negative epsilon.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax.nnx import Rngs
        >>> from batchnorm.flax import nnx
        >>> layer, x = nnx.BatchNorm(2, momentum=0.9, rngs=Rngs(0)), jnp.asarray([[1.0, 10.0], [3.0, 30.0]])
        >>> layer(x).round(3).tolist(), layer.mean[...].round(3).tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """

    __signature__ = OwnSignature()

    #: Whether the constructor made the layer; False if `batchnorm.flax.replace` converted it.
    _is_constructed: bool = False

    # The options of a layer that `batchnorm.flax.replace` converted: the constructor did not set them.
    activation: Activation | None = None
    convention: str | Convention = "flax"
    kernel: str | None = None
    count_skipped: bool = False

    @with_options_of(nnx.BatchNorm.__init__)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        activation: Activation | None = None,
        convention: str | Convention = "flax",
        kernel: str | None = None,
        count_skipped: bool = False,
        **options: Any,
    ) -> None:
        own = checked_options(activation, convention, kernel, count_skipped)
        defaults = {"momentum": own.convention.decay, "epsilon": own.convention.eps, "axis": own.convention.axis}
        for name, default in defaults.items():
            options[name] = default if options.get(name) is None else options[name]
        options["axis"] = checked_axis(options["axis"])
        for name in ("momentum", "epsilon"):
            checked_number(name, options[name])
        if isinstance(num_features, tuple):  # Flax's constructor supports one axis only
            for name, initializer in (("scale_init", nnx.initializers.ones), ("bias_init", nnx.initializers.zeros)):
                options[name] = partial(initialized, options.get(name, initializer), num_features)
        super().__init__(1 if isinstance(num_features, tuple) else num_features, **options)
        self.num_features = num_features  # type: ignore[assignment]
        self.activation, self.convention, self.kernel = activation, convention, kernel
        self.count_skipped, self._is_constructed = own.count_skipped, True
        make_statistics(self)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        lengths: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Apply batch norm; `batchnorm.jax.batch_norm` describes mask, lengths and residual."""
        training = not first_from(
            use_running_average, self.use_running_average,
            error_msg="use_running_average is None: pass it to the constructor or the call, or call train() or eval()",
        )  # fmt: skip
        x = jnp.asarray(x)
        if is_complex(x.dtype, self.dtype, self.param_dtype, self.mean.dtype):
            check_complex(options_of(self), lengths=lengths, residual=residual)
            y: jax.Array = super().__call__(x, use_running_average, mask=mask)
            return y
        return normalize(self, x, training=training, mask=mask, lengths=lengths, residual=residual)


def options_of(layer: BatchNorm) -> Own:
    """Validate the options that Flax's layer lacks."""
    return checked_options(layer.activation, layer.convention, layer.kernel, layer.count_skipped)


def initialized(initializer: Any, shape: tuple[int, ...], key: Any, _: Any, dtype: Any) -> jax.Array:
    """Initialize a parameter of `shape`, whatever shape Flax's constructor asks for."""
    value: jax.Array = initializer(key, shape, dtype)
    return value


def make_statistics(layer: BatchNorm) -> None:
    """Replace the statistics of a new Flax layer by the variables of its convention."""
    own = with_numbers(options_of(layer), None, checked_number("momentum", layer.momentum)[0])
    shape = layer.num_features if isinstance(layer.num_features, tuple) else (layer.num_features,)
    names = variable_names(own)
    if "var" not in names:
        del layer.var
    for name, field in names.items():
        setattr(layer, name, nnx.BatchStat(initial_value(own, field, shape, jnp.float32)))


def normalize(
    layer: BatchNorm,
    x: jax.Array,
    *,
    training: bool,
    mask: jax.Array | None,
    lengths: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    """Apply an nnx batch norm to x, and update its variables."""
    epsilon, epsilon_array = checked_number("epsilon", layer.epsilon)
    momentum, momentum_array = checked_number("momentum", layer.momentum)
    own = with_numbers(options_of(layer), epsilon, momentum)
    names, axes = variable_names(own), normalized_axes(layer.axis, x.ndim)
    variables = {field: getattr(layer, name) for name, field in names.items()}
    state = {field: variable[...] for field, variable in variables.items()}
    scale, bias = (None if parameter is None else parameter[...] for parameter in (layer.scale, layer.bias))
    statistics = {name: state[field] for name, field in names.items() if field in ("mean", "spread")}
    check_shapes(layer, x, axes, {"scale": scale, "bias": bias, **statistics})
    dtype, state_dtype = dtypes_of(layer, x, state["mean"], scale, bias)
    call = LayerCall(training, axes, dtype, state_dtype, own, layer.axis_name, as_groups(layer.axis_index_groups))
    y, updated = apply_batch_norm(
        call, Arrays(x, scale, bias, state, mask, lengths, residual, epsilon_array, momentum_array)
    )
    if training or own.convention.update == "always":
        for field, variable in variables.items():
            variable[...] = updated[field] if has_gradient(variable) else jax.lax.stop_gradient(updated[field])
    return y


def dtypes_of(
    layer: BatchNorm, x: jax.Array, mean: jax.Array, scale: jax.Array | None, bias: jax.Array | None
) -> tuple[Any, Any]:
    """The dtypes of y and of the updated running statistics, which equal those of the installed version of Flax."""
    parameters = [array for array in (scale, bias) if array is not None]
    promote = getattr(layer, "promote_dtype", None)  # from Flax 0.12.1 on
    if promote is promote_dtype:
        computed = dtype = canonical_dtype(layer.dtype, x, mean, *parameters)
    else:
        if promote is not None:
            promoted = jax.eval_shape(partial(promote, dtype=layer.dtype), (x, mean, mean, scale, bias))
            x, *parameters = (promoted[i] for i in (0, 3, 4) if promoted[i] is not None)
        computed, dtype = layer.dtype or x.dtype, canonical_dtype(layer.dtype, x, *parameters)
    if KEEPS_DTYPE or is_reference(layer.mean):
        return dtype, mean.dtype
    return dtype, jnp.result_type(mean.dtype, computed, jnp.float32)


def is_reference(variable: Any) -> bool:
    """Whether a variable of Flax 0.12.0 is a reference, which keeps its dtype when written."""
    return bool(variable.has_ref)


def has_gradient(variable: Any) -> bool:
    """Whether Flax propagates gradients through the running update: only 0.12.0 does, for non-references."""
    return not (KEEPS_DTYPE or is_reference(variable))
