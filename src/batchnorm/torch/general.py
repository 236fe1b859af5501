"""The layer `BatchNorm`: any rank, axis and convention, with a fused activation and residual."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

from batchnorm.convention import Convention, Single
from batchnorm.conventions import find
from batchnorm.kernels.torch.compat import is_compiling, is_exporting, is_tracing
from batchnorm.spec import Activation, Operands, Spec
from batchnorm.torch.conventions import Momentum, is_inference_of_torch, layer_convention, layer_spec
from batchnorm.torch.functional import apply_callable, normalize, one_mask
from batchnorm.torch.layers import Layer, prepare_layer, trace_layer_call
from batchnorm.validation.calls import check_activation


class BatchNorm(LazyModuleMixin, Layer):
    """Batch norm of any rank along any axis, with an activation, a residual, and ghost batches.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    It deliberately does not subclass the batch norms of `torch.nn`: PyTorch's conv-bn fusion would drop the activation.
    With an activation, or with a convention that evaluates differently from PyTorch, adding its `eps` to a tensor
    raises, so code that folds a batch norm by its attributes (`fuse_conv_bn_eval`) fails with a clear message.

    Args:
        num_features: Number of channels; None infers it from the first input.
        axis: The axis of the channels.
        eps: Added to the variance; None is the convention's.
        momentum: Weight of the batch in the running statistics; None is their cumulative average, "convention" the
            convention's value.
        affine: Whether the layer has a weight and a bias.
        track_running_stats: Whether the layer has running statistics; without them evaluation uses those of the batch.
        activation: A name that `batchnorm.batch_norm` accepts, or a callable.
        convention: A name in `batchnorm.CONVENTIONS`, or a `Convention`.
        virtual_batch_size: In training, normalize groups of so many examples (ghost batches) by their own statistics;
            the last group may be smaller. Running statistics use the whole batch, and evaluation is unaffected.
        single: How training treats one element per channel; None is the convention's rule.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; running statistics are float32 if it is narrower.
        bias: Whether an affine layer has a bias.

    Raises:
        ValueError, TypeError: An argument has none of the allowed values.

    Source of ghost batches: Hoffer, Hubara & Soudry 2017.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> layer = bnt.BatchNorm(axis=-1, activation="relu", convention="keras")
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).detach()
        tensor([[0.0000, 0.0000],
                [0.9995, 1.0000]])
        >>> layer
        BatchNorm(2, axis=-1, activation=relu, convention=keras)
    """

    _version = 2

    def __init__(
        self,
        num_features: int | None = None,
        axis: int = 1,
        eps: float | None = None,
        momentum: Momentum = "convention",
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: Activation | None = None,
        convention: str | Convention = "pytorch",
        virtual_batch_size: int | None = None,
        single: Single | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bias: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        record = layer_convention(convention, eps, momentum, single)
        check_activation(activation)
        if num_features is not None and (type(num_features) is not int or num_features < 0):
            raise ValueError(f"num_features is {num_features!r}; it must be a number of channels, or None")
        if virtual_batch_size is not None and (type(virtual_batch_size) is not int or virtual_batch_size < 1):
            raise ValueError(f"virtual_batch_size is {virtual_batch_size!r}; it must be a positive integer, or None")
        self.num_features, self.axis, self._eps, self.momentum = num_features or 0, axis, record.eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.activation, self.convention, self.virtual_batch_size = activation, convention, virtual_batch_size
        self.single = record.single
        is_lazy, narrow = num_features is None, {"device": device, "dtype": dtype}
        is_double = (dtype or torch.get_default_dtype()) == torch.float64
        wide = {"device": device, "dtype": torch.float64 if is_double else torch.float32}
        for name in ("weight", "bias"):
            has_one = affine and (bias or name == "weight")
            parameter: Parameter = UninitializedParameter(**narrow)  # type: ignore[assignment]
            if not is_lazy:
                parameter = Parameter(torch.empty(self.num_features, **narrow))
            self.register_parameter(name, parameter if has_one else None)
        for name in ("running_mean", "running_var"):
            values = UninitializedBuffer(**wide) if is_lazy else torch.empty(self.num_features, **wide)
            self.register_buffer(name, values if track_running_stats else None)
        steps = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", steps if track_running_stats else None)
        if record.debias in ("adam", "weight_sum") and track_running_stats:
            self.register_buffer("running_weight", torch.zeros((), **wide))
        prepare_layer(self)
        if is_lazy:  # as LazyModuleMixin's own __init__ does
            self._load_hook = self._register_load_state_dict_pre_hook(self._lazy_load_hook)  # type: ignore[no-untyped-call]
            self._initialize_hook = self.register_forward_pre_hook(self._infer_parameters, with_kwargs=True)
        else:
            self.reset_parameters()

    @property
    def eps(self) -> float:
        """The layer's eps; a `GuardedEps` if the layer cannot be folded by its attributes."""
        reason = None
        if self.activation is not None:
            reason = f"applies an activation ({self.activation})"
        elif not is_inference_of_torch(self.record):
            reason = f"is of the convention {find(self.convention).name!r}"
        return self._eps if reason is None else GuardedEps(self._eps, reason)

    @eps.setter
    def eps(self, eps: float) -> None:
        self._eps = float(eps)

    @property
    def record(self) -> Convention:
        """The convention with this layer's own eps, momentum and `single`."""
        eps, momentum = self._eps, self.momentum
        if type(momentum) is Tensor:
            momentum = momentum.item()
        record: Convention = layer_convention(self.convention, eps, momentum, self.single)
        return record

    def spec(self, ndim: int, group_size: int = 0) -> Spec:
        """The spec of a call on inputs of this rank, in ghost batches of `group_size`; omits a callable activation."""
        momentum, name = self.momentum, None if callable(self.activation) else self.activation
        if type(momentum) is Tensor:
            momentum = momentum.item()
        options = (self.convention, self._eps, momentum, self.single)
        return layer_spec(*options, self.axis, ndim, name, group_size)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        name = f"{prefix}num_batches_tracked"
        steps = self._buffers["num_batches_tracked"]
        if (local_metadata.get("version") or 1) < 2 and steps is not None and name not in state_dict:
            state_dict[name] = torch.tensor(0) if steps.is_meta else steps
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError(
            "torch.jit.script does not compile batchnorm.torch.BatchNorm; use torch.jit.trace or torch.export, which do"
        )

    def reset_running_stats(self) -> None:
        """Reset the running statistics to their initial values, and the counters to 0."""
        if not self.track_running_stats:
            return
        record = self.record
        self.running_mean.fill_(record.initial_mean)
        self.running_var.fill_(record.initial_spread)
        for tensor in (*map(self._buffers.get, ("num_batches_tracked", "running_weight")), self.skipped):
            if tensor is not None:
                tensor.zero_()

    def reset_parameters(self) -> None:
        """Reset weight to 1, bias to 0, and the running statistics, once the number of features is known."""
        if self.has_uninitialized_params():
            return
        self.reset_running_stats()
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Compute y by the formula of the class; see `batchnorm.torch.batch_norm` for mask and lengths."""
        if isinstance(input, Proxy):
            return trace_layer_call(self, input, mask=mask, lengths=lengths, residual=residual)
        self.check_input(input)
        training = self.normalizes_by_batch()
        operands = Operands(input, self.weight, self.bias, residual, one_mask(mask, lengths))
        group_size = self.virtual_batch_size or 0
        if training and 0 < group_size < len(input):
            check_groups(input, self.axis)
        else:
            group_size = 0
        spec = self.spec(input.ndim, group_size)
        is_tracked = self.track_running_stats and (training or spec.convention.update == "always")
        y = normalize(spec, operands, self.state, training=training, is_tracked=is_tracked)
        return apply_callable(self.activation, y, spec, operands) if callable(self.activation) else y

    def check_input(self, input: Tensor) -> None:
        """Raise unless the input has this layer's number of channels along its axis."""
        if not -input.ndim <= self.axis < input.ndim or input.shape[self.axis] != self.num_features:
            raise ValueError(
                f"the input has shape {tuple(input.shape)}; this layer has {self.num_features} channels along axis "
                f"{self.axis}: pass such an input, or make the layer with the axis of the channels as axis="
            )

    def initialize_parameters(self, input: Tensor, **_: Any) -> None:
        """Set the number of features, from loaded tensors or else from the first input, and create the tensors."""
        tensors = [t for t in (self.weight, self.bias, self.running_mean, self.running_var) if t is not None]
        is_loaded = tensors and not self.has_uninitialized_params()
        self.num_features = len(tensors[0]) if is_loaded else input.shape[self.axis]
        if not is_loaded:
            for tensor in tensors:
                tensor.materialize((self.num_features,))
            self.reset_parameters()

    def extra_repr(self) -> str:
        """The number of channels, and the options that differ from the defaults."""
        shown: dict[str, Any] = {"axis": 1, "activation": None, "convention": "pytorch", "virtual_batch_size": None}
        shown |= {"momentum": "convention", "affine": True, "track_running_stats": True}
        own = {name: getattr(self, name) for name, usual in shown.items() if getattr(self, name) != usual}
        if self._eps != find(self.convention).eps:
            own["eps"] = self._eps
        channels = "lazy" if hasattr(self, "_initialize_hook") else str(self.num_features)
        usual = find(self.convention).single
        return ", ".join([channels, *(f"{name}={value}" for name, value in own.items()), *self.own_repr(usual)])


def check_groups(x: Tensor, axis: int) -> None:
    """Raise if the channels lie along axis 0, which ghost batches group, or if the call is being exported."""
    if axis % x.ndim == 0:
        raise ValueError("the channels lie along axis 0, where virtual_batch_size groups the examples")
    if is_exporting() or (not is_compiling() and is_tracing()):
        raise NotImplementedError(
            "training in ghost batches (virtual_batch_size) cannot be exported; call model.eval()"
        )


class GuardedEps(float):
    """The eps of a layer that its statistics, weight and bias do not describe completely.

    An ordinary float, except that it raises when combined with a tensor: code that computes a scale from the layer's
    attributes would omit the rest of the layer.
    """

    reason: str

    def __new__(cls, eps: float, reason: str) -> "GuardedEps":
        """Create the number; `reason` tells what else the layer does."""
        guarded = super().__new__(cls, eps)
        guarded.reason = reason
        return guarded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise, because the layer cannot be folded by its attributes."""
        eps = next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls))
        # Not a TypeError: Python would replace its message by "unsupported operand types".
        raise ValueError(
            f"this batchnorm.torch.BatchNorm {eps.reason}, which is not in its weight, bias and running statistics: it "
            "cannot be folded into another layer by them"
        )
