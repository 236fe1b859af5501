"""Drop-in layers for those of `torch.nn`: each subclasses PyTorch's class, with the same constructor and state."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional
from torch.nn.parameter import is_lazy

from batchnorm.convention import Convention, Single
from batchnorm.kernels.torch.compat import is_compiling, is_scripting
from batchnorm.spec import Operands, Spec, new_tuple
from batchnorm.torch.arguments import ChannelError
from batchnorm.torch.conventions import pytorch_convention, pytorch_spec
from batchnorm.torch.functional import normalize, one_mask
from batchnorm.torch.joining import deferred
from batchnorm.torch.registries import register_layer
from batchnorm.torch.state import LayerBuffers

HALVES = (torch.float16, torch.bfloat16)
RUNNING = ("running_mean", "running_var")


class Layer(nn.Module):
    """Base class of the batch norms in `batchnorm.torch`, with the differences from PyTorch's.

    Running statistics stay in float32 or float64, whatever the layer is cast to. A batch whose statistics are not
    finite does not update them (`skipped` counts these batches), nor does a forward pass recomputed by checkpointing.

    Attributes:
        single: How training treats one element per channel: `error`, or `running`, which normalizes it by the running
            statistics without updating them.
        is_frozen: Normalize by the running statistics in training mode too; see `batchnorm.torch.freeze`.
        skipped: Number of batches that did not update the running statistics; not a buffer, and not in the
            `state_dict`.
        fused: The operation that follows the layer and is computed in the same pass, such as `relu` and `add+relu`; see
            `batchnorm.torch.replace`.
    """

    axis: int = 1
    single: Single = "error"
    is_frozen: bool = False
    thawed_parameters: tuple[str, ...] = ()  # those that `unfreeze` makes trainable again
    fused: str | None = None
    _name: str | None = None  # in the model, for messages
    native: type[nn.Module] | None = None  # the class that `restore` gives back, where it is not PyTorch's counterpart

    __constants__ = ["track_running_stats", "momentum", "eps", "num_features", "affine", "is_frozen"]  # noqa: RUF012
    __jit_unused_properties__ = ("record", "state")
    __jit_ignored_attributes__ = ("thawed_parameters", "fused", "_name", "native", "skipped", "single")
    if TYPE_CHECKING:  # torch.jit.script reads annotations, and does not support Any
        eps: float
        momentum: Any  # float | None, as in torch.nn; `BatchNorm` allows more
        num_features: int
        track_running_stats: bool
        weight: Any  # nn.Parameter | None
        bias: Any
        running_mean: Any  # Tensor | None
        running_var: Any
        num_batches_tracked: Any
        skipped: Tensor | None
        _check_input_dim: Callable[[Tensor], None]

    def __init__(self, *args: Any, single: Single = "error", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if single not in ("error", "running"):
            raise ValueError(f"single is {single!r}; allowed are 'error' and 'running'")
        if single != "error":
            self.single = single
        prepare_layer(self)
        self._keep_statistics_wide()

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Normalize the input; see `batchnorm.torch.batch_norm` for mask and lengths."""
        if is_scripting():
            assert mask is None, "a scripted batch norm takes no mask"
            assert lengths is None, "a scripted batch norm takes no lengths"
            return self.scripted_forward(input)
        else:  # noqa: RET505  (which torch.jit.script skips)
            if isinstance(input, Proxy):
                return trace_layer_call(self, input, mask=mask, lengths=lengths)
            self._check_input_dim(input)
            # `nn.Module.__getattr__` takes as long as the statistics of a small batch. (A parametrized weight is a
            # property.)
            parameters = self._parameters
            weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
            bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
            if self.fused is not None and mask is None and lengths is None and not is_compiling():
                y = deferred(self, input, weight, bias)
                if y is not None:
                    return y
            training = self.normalizes_by_batch()
            masked = mask if lengths is None else one_mask(mask, lengths)
            operands = new_tuple(Operands, (input, weight, bias, None, masked))
            tracks = training and self.track_running_stats
            return normalize(self.spec(input.ndim), operands, self.state, training=training, is_tracked=tracks)

    def scripted_forward(self, input: Tensor) -> Tensor:
        """The forward pass that `torch.jit.script` compiles, by PyTorch's own batch norm."""
        self._check_input_dim(input)
        training = (self.training and not self.is_frozen) or self.running_mean is None
        is_tracked = training and self.track_running_stats and self.running_mean is not None
        factor = 0.0 if self.momentum is None else self.momentum
        if is_tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        has_state = is_tracked or not training
        return functional.batch_norm(
            input, self.running_mean if has_state else None, self.running_var if has_state else None,
            self.weight, self.bias, training, factor, self.eps,
        )  # fmt: skip

    @property
    def record(self) -> Convention:
        """PyTorch's convention with this layer's eps, momentum and `single`."""
        momentum: Any = self.momentum
        eps: Any = self.eps
        if type(momentum) is Tensor or type(eps) is Tensor:  # PyTorch's operator accepts tensors as well
            momentum, eps = (value.item() if type(value) is Tensor else value for value in (momentum, eps))
        return pytorch_convention(momentum, eps, self.single)

    def spec(self, ndim: int) -> Spec:
        """The spec of a call on an input of this rank."""
        momentum: Any = self.momentum
        eps: Any = self.eps
        if type(momentum) is Tensor or type(eps) is Tensor:  # PyTorch's operator accepts tensors as well
            momentum, eps = (value.item() if type(value) is Tensor else value for value in (momentum, eps))
        return pytorch_spec(ndim, momentum, eps, self.single)

    @property
    def state(self) -> LayerBuffers | None:
        """The buffers with the running statistics; None if the layer has none."""
        buffers = self._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        if mean is None or var is None:
            return None
        get, skipped = buffers.get, self.skipped
        if skipped is not None and skipped.is_meta and not mean.is_meta:
            skipped = None  # a meta layer called with other tensors (torch.func.functional_call)
        buffers_of_state = (mean, var, get("num_batches_tracked"), get("running_weight"), skipped, self._name)
        return new_tuple(LayerBuffers, buffers_of_state)  # type: ignore[no-any-return]

    def check_input(self, input: Tensor) -> None:
        """Raise unless the input has the rank and the number of channels of this layer."""
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ChannelError(f"expected {self.num_features} channels, got input size {tuple(input.shape)}")

    def spans_processes(self) -> bool:
        """Whether the statistics are computed over several processes."""
        return False

    def normalizes_by_batch(self) -> bool:
        """Whether a call normalizes by the statistics of its batch rather than the running ones."""
        return (self.training and not self.is_frozen) or self._buffers["running_mean"] is None

    def reset_running_stats(self) -> None:
        """Reset the running statistics and the counters."""
        super().reset_running_stats()  # type: ignore[misc]
        if self.__dict__.get("skipped") is not None:
            self.skipped.zero_()  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """PyTorch's text, followed by options and state that PyTorch's layers do not have."""
        return ", ".join([super().extra_repr(), *self.own_repr("error")])

    def own_repr(self, usual: Single) -> list[str]:
        """Options and state that PyTorch's layers do not have, where set; `usual` is the default of `single`."""
        number = 0 if self.skipped is None or self.skipped.is_meta else int(self.skipped)
        shown = {
            f"single={self.single!r}": self.single != usual,
            "frozen": self.is_frozen,
            f"fused={self.fused}": self.fused is not None,
            f"skipped={number}": number > 0,
        }
        return [text for text, is_shown in shown.items() if is_shown]

    def train(self, mode: bool = True) -> "Layer":
        """Set the mode; also registers the class with libraries imported meanwhile."""
        register_layer(type(self))
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        if name == "qconfig" and (self.is_frozen or self.single == "running"):
            refuse_native_synchronization(self, sys._getframe(1).f_code.co_name)
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        before = {name: self._buffers[name] for name in RUNNING}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_statistics_wide(before)
        self._keep_counter_beside()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_statistics_wide()  # `assign=True` stores the loaded tensors themselves
        self._keep_counter_beside()

    def _keep_statistics_wide(self, before: dict[str, Tensor | None] | None = None) -> None:
        for name in RUNNING:
            buffer = self._buffers[name]
            if buffer is None or buffer.dtype not in HALVES or is_lazy(buffer):
                continue
            wide = before[name] if before else None  # not rounded yet
            if wide is None or wide.dtype in HALVES:
                wide = buffer.float()
            self._buffers[name] = wide.to(buffer.device)

    def _keep_counter_beside(self) -> None:
        """Keep `skipped` on the device of `num_batches_tracked`; it starts at 0 if either was a meta tensor."""
        steps: Any = self._buffers["num_batches_tracked"]
        skipped: Any = self.skipped
        if steps is None:
            self.skipped = None
        elif skipped is None or skipped.device != steps.device:
            is_new = skipped is None or skipped.is_meta or steps.is_meta
            self.skipped = torch.zeros_like(steps) if is_new else skipped.to(steps.device)


def prepare_layer(layer: Any) -> None:
    """Register a layer's class, and add the counter of skipped batches, which PyTorch's layers lack."""
    register_layer(type(layer))
    if "skipped" not in layer.__dict__:
        steps = layer._buffers["num_batches_tracked"]
        layer.skipped = None if steps is None else torch.zeros_like(steps)


def native_class(layer: nn.Module) -> type[nn.Module]:
    """The class that `restore` gives a layer."""
    if (native := getattr(layer, "native", None)) is not None:
        return native  # type: ignore[no-any-return]
    of_torch = (kind for kind in type(layer).__mro__ if kind.__module__ == nn.BatchNorm2d.__module__)
    return next((kind for kind in of_torch if not kind.__name__.startswith("_")), nn.SyncBatchNorm)


def refuse_native_synchronization(layer: Layer, caller: str) -> None:
    """Raise if `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would drop options that its layers lack.

    That function creates a layer from a few attributes, and reads `qconfig` last; nothing else reveals the conversion.
    """
    if caller == "convert_sync_batchnorm":
        what = "frozen" if layer.is_frozen else "single='running'"
        raise RuntimeError(
            f"{layer._name or layer!r} is {what}, which torch.nn.SyncBatchNorm does not know; call "
            "batchnorm.torch.SyncBatchNorm.convert_sync_batchnorm(model), which keeps it"
        )


def trace_layer_call(layer: nn.Module, x: Proxy, **arguments: Any) -> Any:
    """Record a call as one node of `torch.fx`, as for `torch.nn` layers, so that `eval` works on the traced module."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), given)  # type: ignore[attr-defined]


class BatchNorm1d(Layer, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) or (N, C, L), with optional `mask` or `lengths` in the call.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None is their cumulative average.
        affine: Whether the layer has a weight and a bias.
        track_running_stats: Whether the layer has running statistics; without them evaluation uses those of the batch.
        device: Device of parameters and buffers.
        dtype: Dtype of parameters and buffers; running statistics are float32 if it is narrower.
        bias: Whether an affine layer has a bias.
        single: See `Layer`.

    Example:
        >>> import torch, batchnorm.torch as bnt
        >>> layer = bnt.BatchNorm1d(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]], grad_fn=<NormalizationBackward>)
        >>> layer.running_mean
        tensor([0.2000, 2.0000])
    """


class BatchNorm2d(Layer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W), with optional `mask` or `lengths`; arguments as in `BatchNorm1d`."""


class BatchNorm3d(Layer, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, D, H, W), with optional `mask` or `lengths`; arguments as in `BatchNorm1d`."""


class LazyBatchNorm1d(Layer, nn.LazyBatchNorm1d):
    """`BatchNorm1d` that infers its number of features from the first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(Layer, nn.LazyBatchNorm2d):
    """`BatchNorm2d` that infers its number of features from the first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(Layer, nn.LazyBatchNorm3d):
    """`BatchNorm3d` that infers its number of features from the first input."""

    cls_to_become = BatchNorm3d
