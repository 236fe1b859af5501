"""The layers of `torch.nn`, and one of our own.

`BatchNorm1d`, `2d` and `3d` are batch norms to everyone who asks `isinstance(module, torch.nn.BatchNorm2d)`, with the
same constructor, attributes, state and errors. `BatchNorm` is not: it may contain an activation, which PyTorch's own
fusion of convolutions with batch norms would drop.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parameter import is_lazy

from batchnorm.convention import Convention, Single
from batchnorm.kernels.torch import in_words_of_pytorch
from batchnorm.torch.arguments import ChannelError
from batchnorm.torch.functional import normalize
from batchnorm.torch.privacy import warn_opacus_of
from batchnorm.torch.state import State

HALVES = (torch.float16, torch.bfloat16)
RUNNING = ("running_mean", "running_var")


class Layer(nn.Module):
    """What our batch norms do otherwise than PyTorch's.

    Running statistics stay in float32 or float64 whatever the layer is cast to, take in no batch whose statistics are
    not finite (`skipped` counts these) and none twice (checkpointing computes the forward pass again).

    Attributes:
        single: What one element per channel does in training: `error`, or `running`, which normalises it by the
            running statistics and leaves these as they are.
        is_frozen: Normalise by the running statistics in training mode too; see `batchnorm.torch.freeze`.
    """

    axis: int = 1
    single: Single = "error"
    is_frozen: bool = False
    thawed_parameters: tuple[str, ...] = ()  # those that `unfreeze` trains again

    eps: float
    momentum: Any  # float | None, as in torch.nn; `BatchNorm` has more
    num_features: int
    track_running_stats: bool
    weight: Any  # nn.Parameter | None
    bias: Any
    running_mean: Any  # Tensor | None
    running_var: Any
    num_batches_tracked: Any
    skipped: Any
    _check_input_dim: Callable[[Tensor], None]

    def __init__(self, *args: Any, single: Single = "error", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if single not in ("error", "running"):
            raise ValueError(f"single is {single!r}; allowed are 'error' and 'running'")
        if single != "error":
            self.single = single
        make_ours(self)
        self._keep_statistics_wide()

    def forward(
        self,
        input: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The normalised input; see `batchnorm.torch.batch_norm` for mask and lengths."""
        if isinstance(input, Proxy):
            return recorded(self, input, mask=mask, lengths=lengths)
        self._check_input_dim(input)
        # Looking for attributes of a module takes as long as the statistics of a small batch. (A parametrised weight is
        # a property.)
        parameters = self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        training = self.normalizes_by_batch()
        return normalize(
            input, weight, bias, self.state, self.record,
            training=training, is_tracked=training and self.track_running_stats, mask=mask, lengths=lengths,
        )  # fmt: skip

    @property
    def record(self) -> Convention:
        """PyTorch's convention with this layer's eps, momentum and rule for one element."""
        return in_words_of_pytorch(self.momentum, self.eps, self.single)  # type: ignore[no-any-return]

    @property
    def state(self) -> State | None:
        """The running statistics, if the layer has any."""
        buffers = self._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        if mean is None or var is None:
            return None
        get = buffers.get
        return State(mean, var, get("num_batches_tracked"), get("running_weight"), get("skipped"))

    def check_input(self, input: Tensor) -> None:
        """Raise unless the input has the rank and the channels of this layer."""
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ChannelError(f"expected {self.num_features} channels, got input size {tuple(input.shape)}")

    def spans_processes(self) -> bool:
        """Whether the statistics are those of several processes."""
        return False

    def normalizes_by_batch(self) -> bool:
        """Whether a call takes the statistics of its batch rather than the running ones."""
        return (self.training and not self.is_frozen) or self._buffers["running_mean"] is None

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        super().reset_running_stats()  # type: ignore[misc]
        if (skipped := self._buffers.get("skipped")) is not None:
            skipped.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        before = {name: self._buffers[name] for name in RUNNING}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._keep_statistics_wide(before)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_statistics_wide()  # `assign=True` puts the loaded tensors themselves in place

    def _keep_statistics_wide(self, before: dict[str, Tensor | None] | None = None) -> None:
        for name in RUNNING:
            buffer = self._buffers[name]
            if buffer is None or buffer.dtype not in HALVES or is_lazy(buffer):
                continue
            wide = before[name] if before else None  # not rounded yet
            if wide is None or wide.dtype in HALVES:
                wide = buffer.float()
            self._buffers[name] = wide.to(buffer.device)


def make_ours(layer: nn.Module) -> None:
    """Give a layer what PyTorch's has not: its count of refused batches, which is no part of its `state_dict`."""
    warn_opacus_of(type(layer))
    if "skipped" not in layer._buffers:
        steps = layer._buffers["num_batches_tracked"]
        layer.register_buffer("skipped", None if steps is None else torch.zeros_like(steps), persistent=False)


def recorded(layer: nn.Module, x: Proxy, **arguments: Any) -> Any:
    """The call of a layer as one node of `torch.fx`, as of a layer of `torch.nn`: `eval` works on the traced module."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), given)  # type: ignore[attr-defined]


class BatchNorm1d(Layer, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` of (N, C) or (N, C, L), with `mask` or `lengths` in the call.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None is their cumulative average.
        affine: Whether there are a weight and a bias.
        track_running_stats: Whether there are running statistics; without them the batch's own serve in evaluation.
        device: Of parameters and buffers.
        dtype: Likewise; running statistics are float32 where it is narrower.
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
    """`torch.nn.BatchNorm2d` of (N, C, H, W), likewise; see `BatchNorm1d`."""


class BatchNorm3d(Layer, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` of (N, C, D, H, W), likewise; see `BatchNorm1d`."""


class LazyBatchNorm1d(Layer, nn.LazyBatchNorm1d):
    """`BatchNorm1d` that takes its number of features from the first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(Layer, nn.LazyBatchNorm2d):
    """`BatchNorm2d` that takes its number of features from the first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(Layer, nn.LazyBatchNorm3d):
    """`BatchNorm3d` that takes its number of features from the first input."""

    cls_to_become = BatchNorm3d
