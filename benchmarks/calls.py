"""The cost of a small call by each kind of call, relative to the simplest one.

    python -m benchmarks.calls            # under a minute

x is (8, 4, 6, 6) or (32, 16), in float32, on one thread: the overhead between the call and the kernel is what is
measured. The calls of a group take turns in one process (README.md), and each row is the time relative to the first.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import batchnorm as bn
import batchnorm.torch as bnt
from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.timing import Effort, race, warm_up

SHAPES = ((8, 4, 6, 6), (32, 16))
Calls = dict[str, Callable[[], object]]


def three_quarters(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask over samples that excludes every fourth."""
    return (np.arange(shape[0]) % 4 < 3).reshape(-1, *(1,) * (len(shape) - 1))


def numpy_calls(shape: tuple[int, ...]) -> Calls:
    """`bn.forward`, and `bn.batch_norm` with the state that the previous call returned."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=shape).astype(np.float32)
    gamma, beta = np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)
    mask = three_quarters(shape)

    def loop(**options: Any) -> Callable[[], object]:
        def calls() -> Iterator[Any]:
            running = bn.RunningStatistics.initial(shape[1], options.get("convention", "pytorch"), like=x)
            while True:
                y, running = bn.batch_norm(x, gamma, beta, running, axis=1, **options)
                yield y

        made = calls()
        list(islice(made, 3))
        return lambda: next(made)

    return {
        "forward": lambda: bn.forward(x, gamma, beta, axis=1),
        "batch_norm, training": loop(training=True),
        "another convention": loop(training=True, convention="lasagne-gist"),
        "masked": loop(training=True, mask=mask),
        "masked, another convention": loop(training=True, mask=mask, convention="keras"),
        "batch_norm, inference": loop(training=False),
    }


class Allocation(torch.autograd.Function):
    """The results of a batch norm and of its gradients, allocated and not computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """y."""
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """dx, dweight and dbias."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


#: `Allocation.apply` without what it does for torch.func, as the layers call theirs.
allocate: Callable[..., Tensor] = super(torch.autograd.Function, Allocation).apply


class Floor(torch.nn.BatchNorm2d):
    """The least that a layer in Python takes: a module whose call allocates the results."""

    def forward(self, input: Tensor) -> Tensor:
        """Uninitialized numbers."""
        return allocate(input, self.weight, self.bias) if torch.is_grad_enabled() else torch.empty_like(input)


def layer_calls(shape: tuple[int, ...], *, backward: bool) -> Calls:
    """Calls of layers in training, forward only or with the backward pass."""
    x = torch.randn(shape, requires_grad=backward)
    dy, mask = torch.randn(shape), torch.from_numpy(three_quarters(shape))
    plain = (bnt.BatchNorm2d if len(shape) == 4 else bnt.BatchNorm1d)(shape[1])
    native = (torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d)(shape[1])

    def calls(layer: torch.nn.Module, **options: Any) -> Callable[[], object]:
        def both() -> Any:
            y = layer(x, **options)
            y.backward(dy)
            return y

        def without_gradients() -> Any:
            with torch.no_grad():
                return layer(x, **options)

        return both if backward else without_gradients

    return {
        "layer": calls(plain),
        "torch.nn": calls(native),
        "a layer that only allocates": calls(Floor(shape[1])),
        "with ReLU": calls(bnt.BatchNorm(shape[1], activation="relu")),
        "masked": calls(plain, mask=mask),
        "another convention": calls(bnt.BatchNorm(shape[1], convention="lasagne-gist")),
        "ghost batches of 4": calls(bnt.BatchNorm(shape[1], virtual_batch_size=4)),
    }


def report(title: str, shape: tuple[int, ...], calls: Calls, effort: Effort) -> None:
    """Race the calls and print a row for each."""
    case = Case("tiny", "forward", "float32", "NCHW" if len(shape) == 4 else "NC", shape)
    contestants = [Contestant(name, run) for name, run in calls.items()]
    timings = race(contestants, case, effort, {one.name: warm_up(one) for one in contestants})
    first = next(iter(timings.values())).p50
    print(f"\n{title} {shape}")
    for name, timing in timings.items():
        print(f"  {name:28} {timing.p50:8.1f} us {timing.p50 / first:7.2f}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of calls for each table (3)")
    effort = Effort(seconds=parser.parse_args().seconds)
    torch.set_num_threads(1)
    bn.set_num_threads(1)
    for shape in SHAPES:
        report("NumPy", shape, numpy_calls(shape), effort)
        report("PyTorch, no_grad", shape, layer_calls(shape, backward=False), effort)
        report("PyTorch, both passes", shape, layer_calls(shape, backward=True), effort)


if __name__ == "__main__":
    main()
