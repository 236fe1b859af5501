"""Detection of batch norms followed by an activation: runs a copy of the model, and checks the fused results."""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_map

from batchnorm.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch.waiting import Record, recording

FUSED = (BatchNorm1d, BatchNorm2d, BatchNorm3d)

#: Largest difference that fusing may cause in float64, relative to the largest entry of the tensor, and of all tensors.
TOLERANCE = (1e-8, 1e-12)

#: Tolerance for a model that does not run in float64; loose, because a wrong result is off by its own size.
ROUGH_TOLERANCE = (1e-2, 1e-3)


@dataclass
class Fusible:
    """The layers that can be fused, each with the operation that follows it, and the others, each with the reason."""

    fused: dict[str, str]
    unfused: dict[str, str]


def find_fusible(model: nn.Module, example: Any, prepare: Callable[[nn.Module], Any]) -> Fusible:
    """Find the layers whose result is used by one activation and nothing else, in both training and evaluation.

    Args:
        model: Not changed.
        example: Input of the model: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
        prepare: Replaces the batch norms of the copy.

    Raises:
        ValueError: The model cannot be copied, or the copy does not run.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    try:
        trial, expected = first_run(model, example, prepare)
        return found_by(trial, expected)
    except Exception as error:
        raise ValueError(
            f"a copy of the model cannot be run on the example, in training and in evaluation: {error}"
        ) from error
    finally:  # in case the copy calls the original model
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def found_by(trial: "Trial", expected: list[list[Tensor]]) -> Fusible:
    """The layers that an activation follows in a trial, and that give the expected results when fused with it."""
    fused: dict[str, str] = {}
    unfused: dict[str, str] = {}
    for name, (in_training, in_evaluation) in trial.followers(list(trial.layers)).items():
        outcome = in_training if in_training == in_evaluation else None
        if outcome is not None and outcome.operation is not None:
            fused[name] = outcome.operation
        else:
            unfused[name] = reason_of(in_training, in_evaluation)
    if fused and not trial.agrees(expected, fused):
        for name in [name for name in fused if not trial.agrees(expected, [name])]:
            unfused[name] = "fused, it does not give the results of the unfused model"
            del fused[name]
        if not trial.agrees(expected, fused):
            unfused |= dict.fromkeys(fused, "fused together, they do not give the results of the unfused model")
            fused = {}
    return Fusible(fused, unfused)


def first_run(
    model: nn.Module, example: Any, prepare: Callable[[nn.Module], Any]
) -> tuple["Trial", list[list[Tensor]]]:
    """Copy the model; returns the copy and its results in training and in evaluation.

    The copy is in float64, or in the model's own dtype if it does not run in float64.
    """
    try:
        trial = Trial(model, example, prepare, torch.float64)
        return trial, [trial.run(mode) for mode in (True, False)]
    except Exception:
        trial = Trial(model, example, prepare, None)
        return trial, [trial.run(mode) for mode in (True, False)]


@dataclass(frozen=True)
class Follower:
    """The operation that follows a layer in one mode, or the reason why it cannot be fused."""

    operation: str | None
    reason: str

    @classmethod
    def of(cls, records: list[Record]) -> "Follower":
        """The one operation that was fused with every call, or the reason why there is none."""
        operations = sorted({operation for record in records for operation in record.joined})
        others = sorted({name for record in records for name in record.others})
        if others or len(operations) > 1:
            return cls(None, f"its result goes to {' and '.join(operations + others)}")
        if any(record.call() is not None for record in records):
            return cls(None, "its result is kept after the forward pass")
        if any(len(record.joined) != 1 for record in records):
            return cls(None, "its result is not used, or more than once")
        return cls(operations[0], "")


def reason_of(in_training: Follower | None, in_evaluation: Follower | None) -> str:
    """The reason why a layer is not fused."""
    if in_training is None and in_evaluation is None:
        return "it is not called with the example on the CPU, or is watched by hooks"
    if in_training is None or in_evaluation is None:
        return f"it is not called in {'training' if in_training is None else 'evaluation'}, or is watched by hooks"
    if in_training.reason == in_evaluation.reason != "":
        return in_training.reason
    both = (f.reason or f"its result goes to {f.operation}" for f in (in_training, in_evaluation))
    return "in training {}, in evaluation {}".format(*both)


class Trial:
    """A copy of a model that is run repeatedly, each time from the same state and random numbers."""

    def __init__(
        self, model: nn.Module, example: Any, prepare: Callable[[nn.Module], Any], dtype: torch.dtype | None
    ) -> None:
        self.model = copy.deepcopy(model).to(dtype)
        self.tolerance = TOLERANCE if dtype == torch.float64 else ROUGH_TOLERANCE
        prepare(self.model)
        self.layers = {name or type(m).__name__: m for name, m in self.model.named_modules() if type(m) in FUSED}
        for layer in self.layers.values():
            layer.fused = None
        self.example, self.dtype = example, dtype
        self.buffers = {name: tensor.clone() for name, tensor in self.model.named_buffers()}

    @contextmanager
    def fusing(self, names: Iterable[str]) -> Iterator[None]:
        """Context manager in which these layers return deferred results."""
        for name in names:
            self.layers[name].fused = "?"
        try:
            with recording():
                yield
        finally:
            for layer in self.layers.values():
                layer.fused = None

    def run(self, mode: bool) -> list[Tensor]:
        """Outputs, gradients of a randomly weighted sum of the outputs, and the buffers afterwards."""
        with self.rewound(mode):
            example = tree_map(partial(copied, dtype=self.dtype), self.example)
            outputs = [t for t in tensors_of(self.call(example)) if t.is_floating_point()]
            leaves = [t for t in (*self.model.parameters(), *tensors_of(example)) if t.requires_grad]
            generator = torch.Generator("cpu").manual_seed(1)
            terms = [
                (t * torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device)).sum()
                for t in outputs
                if t.requires_grad
            ]
            gradients: tuple[Tensor | None, ...] = ()
            if terms and leaves:
                gradients = torch.autograd.grad(torch.stack(terms).sum(), leaves, allow_unused=True)
            buffers = [t.clone() for t in self.model.buffers()]
            return [t.detach() for t in (*outputs, *gradients, *buffers) if t is not None]

    def followers(self, names: list[str]) -> dict[str, list["Follower | None"]]:
        """The follower of each layer, in training and in evaluation."""
        try:
            with self.fusing(names):
                found = [self.followers_in(mode) for mode in (True, False)]
        except Exception as error:  # a deferred result can make the model fail in any way
            if len(names) > 1:
                return {name: followers for each in names for name, followers in self.followers([each]).items()}
            return {name: [Follower(None, f"waiting for what follows it fails ({error})")] * 2 for name in names}
        return {name: [followers.get(name) for followers in found] for name in names}

    def followers_in(self, mode: bool) -> dict[str, Follower]:
        """The follower of each layer in one mode; layers whose results were not deferred are absent."""
        with self.rewound(mode), recording() as records:
            output = self.call(tree_map(partial(copied, dtype=self.dtype), self.example))
            by_layer = defaultdict(list)
            for record in records:
                by_layer[record.layer].append(record)
            found = {name: Follower.of(by_layer[layer]) for name, layer in self.layers.items() if by_layer[layer]}
            del output
            return found

    def agrees(self, expected: list[list[Tensor]], names: Iterable[str]) -> bool:
        """Whether the model gives the expected results with these layers fused."""
        try:
            with self.fusing(names):
                return all(are_close(self.run(mode), expected[not mode], *self.tolerance) for mode in (True, False))
        except Exception:  # a deferred result can make the model fail in any way
            return False

    def call(self, example: Any) -> Any:
        """The model's output for a tensor, a tuple of arguments, or a dictionary of keyword arguments."""
        if isinstance(example, dict):
            return self.model(**example)
        return self.model(*example) if isinstance(example, tuple) else self.model(example)

    @contextmanager
    def rewound(self, mode: bool) -> Iterator[None]:
        """Context manager that resets state, random numbers and mode to the start of a run."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        before = random.getstate(), numpy.random.get_state()  # noqa: NPY002  (a model may use it)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            random.seed(0)
            numpy.random.seed(0)  # noqa: NPY002
            self.model.train(mode)
            try:
                yield
            finally:
                random.setstate(before[0])
                numpy.random.set_state(before[1])  # noqa: NPY002


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def copied(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of a tensor, in this dtype if it is floating-point; other values are returned unchanged."""
    if not isinstance(value, Tensor):
        return value
    own = value.detach().clone()
    return own.to(dtype).requires_grad_(value.requires_grad) if own.is_floating_point() else own


def are_close(ours: list[Tensor], expected: list[Tensor], tolerance: float, noise: float) -> bool:
    """Whether the tensors are equal up to rounding, NaN and infinities included."""
    if [t.shape for t in ours] != [t.shape for t in expected]:
        return False
    largest = [largest_entry(t) for t in expected]
    # A tensor that is 0 up to rounding, such as the gradient of a bias before a batch norm, has the others' rounding
    # error.
    noise *= max(largest, default=0.0)
    return all(
        torch.allclose(a, b, rtol=0, atol=tolerance * own + noise, equal_nan=True)
        for a, b, own in zip(ours, expected, largest, strict=True)
    )


def largest_entry(values: Tensor) -> float:
    """The largest magnitude of a finite entry; 0 if there is none."""
    finite = values[values.isfinite()].double().abs()
    return float(finite.max()) if finite.numel() else 0.0
