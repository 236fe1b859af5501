"""A batch norm followed by an activation, without and with a residual between them: PyTorch's, ours, and ours fused.

    python -m benchmarks.fusing                 # ResNet-50's shapes; a minute or two on two cores

Blocks of a network in ordinary code, training forward and backward and inference, in float32 and NCHW. The three take
turns in one process, as in the other benchmarks (see README.md).
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import batchnorm.torch as bnt
from benchmarks.arrays import make
from benchmarks.cases import Case, all_cases
from benchmarks.contestants import Contestant
from benchmarks.passes import warm_caches
from benchmarks.timing import Effort, race, warm_up


class Block(nn.Module):
    """The end of a residual block, or of a plain one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The activation of the normalized x, with the residual added."""
        z: Tensor = self.norm(x)
        if residual is not None:
            z += residual
        y: Tensor = self.activation(z)
        return y


def blocks(channels: int, *inputs: Tensor) -> dict[str, nn.Module]:
    """The variants of the block: PyTorch's, ours, and ours fused."""
    variants: dict[str, nn.Module] = {name: Block(channels) for name in ("PyTorch", "ours", "fused")}
    bnt.replace(variants["ours"])
    example = tuple(t.detach()[:2] for t in inputs)
    assert bnt.replace(variants["fused"], fuse=True, example=example).fused
    return variants


def training_step(block: nn.Module, inputs: tuple[Tensor, ...], dy: Tensor) -> Callable[[], object]:
    """A training step; y and the gradients of the inputs are returned so that none is freed in the timed call."""

    def run() -> object:
        y = block(*inputs)
        y.backward(dy)
        gradients = [t.grad for t in inputs]
        for t in inputs:
            t.grad = None
        block.zero_grad()
        return y, gradients

    return run


def inference(block: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A forward pass by the running statistics."""
    block.eval()

    def run() -> object:
        with torch.no_grad():
            return block(*inputs)

    return run


def times(case: Case, effort: Effort, *, has_residual: bool, is_training: bool) -> dict[str, float]:
    """The median time of each variant in microseconds."""
    arrays = make(case)
    assert arrays.dy is not None
    inputs = [arrays.x.detach().requires_grad_()]
    if has_residual:
        inputs.append(torch.randn(case.shape).requires_grad_())
    tensors = tuple(inputs)
    contestants = []
    for name, block in blocks(case.channels, *tensors).items():
        run = training_step(block, tensors, arrays.dy) if is_training else inference(block, tensors)
        contestants.append(Contestant(name, run, warm_caches=partial(warm_caches, arrays)))
    estimates = {contestant.name: warm_up(contestant) for contestant in contestants}
    timings = race(contestants, case, effort, estimates)
    return {name: timing.p50 for name, timing in timings.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls for each case (1)")
    effort = Effort(seconds=parser.parse_args().seconds)
    grid = [case for case in all_cases() if case.is_in_grid and case.operation == "forward+backward"]
    cases = [case for case in grid if (case.dtype, case.layout) == ("float32", "NCHW")]
    print(
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; times of the fused block in us, and how many"
    )
    print("times as fast it is as PyTorch's and as ours without fusing")
    for is_training in (True, False):
        for has_residual in (False, True):
            print(("training" if is_training else "inference") + (", add, ReLU" if has_residual else ", ReLU"))
            ratios = []
            for case in cases:
                found = times(case, effort, has_residual=has_residual, is_training=is_training)
                ratios.append([found[name] / found["fused"] for name in ("PyTorch", "ours")])
                shown = " ".join(f"{ratio:6.2f}" for ratio in ratios[-1])
                print(f"  {case.shape!s:20} {found['fused']:9,.0f} {shown}", flush=True)
            means, least = np.exp(np.log(ratios).mean(0)), np.min(ratios, 0)
            print(f"  on average {means[0]:.2f} {means[1]:.2f}, least {least[0]:.2f} {least[1]:.2f}")


if __name__ == "__main__":
    main()
