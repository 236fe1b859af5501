"""`batchnorm.torch.BatchNorm2d` against `torch.nn.BatchNorm2d` as modules, with autograd and running statistics.

    python -m benchmarks.layers                 # ResNet-50's shapes and small ones; some three minutes on two cores

Training forward and backward. The layers take turns in one process, as in the other benchmarks (see README.md): after a
few untimed calls, with x and dy read before, and with gradients None as optimizers leave them.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

import batchnorm.torch as bnt
from benchmarks.arrays import make
from benchmarks.cases import DTYPES, Case, Shape, all_cases
from benchmarks.contestants import Contestant
from benchmarks.passes import warm_caches
from benchmarks.timing import Effort, race, warm_up

SMALL = [(2, 3), (32, 16), (256, 120), (2, 3, 4, 4), (8, 16, 8, 8), (16, 512, 2, 2), (16, 256, 4, 4), (64, 6, 24, 24)]


def training_step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    """A training step; y and all gradients are returned so that none is freed in the timed call."""

    def run() -> object:
        y = layer(x)
        y.backward(dy)
        gradients = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        x.grad = None
        layer.zero_grad()
        return y, gradients

    return run


def ratio(case: Case, effort: Effort) -> tuple[float, float]:
    """Our median in microseconds, and PyTorch's divided by ours."""
    arrays = make(case)
    assert arrays.dy is not None
    x = arrays.x.detach().requires_grad_()
    kind = "BatchNorm2d" if len(case.shape) == 4 else "BatchNorm1d"
    contestants = [
        Contestant(
            name,
            training_step(getattr(module, kind)(case.channels), x, arrays.dy),
            warm_caches=partial(warm_caches, arrays),
        )
        for name, module in (("ours", bnt), ("PyTorch", nn))
    ]
    estimates = {contestant.name: warm_up(contestant) for contestant in contestants}
    timings = race(contestants, case, effort, estimates)
    return timings["ours"].p50, timings["PyTorch"].p50 / timings["ours"].p50


def measured_cases() -> list[Case]:
    """ResNet-50's cases up to 32 MB in both layouts and dtypes, then small ones in float32."""
    grid = [case for case in all_cases() if case.is_in_grid and case.operation == "forward+backward"]
    small: list[tuple[str, Shape]] = [
        (layout, shape) for shape in SMALL for layout in (("NCHW", "channels-last") if len(shape) == 4 else ("NC",))
    ]
    return grid + [Case("tiny", "forward+backward", "float32", layout, shape) for layout, shape in small]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls for each case (2)")
    effort = Effort(seconds=parser.parse_args().seconds)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; how many times as fast ours is")
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for case in measured_cases():
        ours, times = ratio(case, effort)
        ratios.setdefault((case.family, case.dtype, case.layout), []).append(times)
        print(f"{case.dtype:9} {case.layout:14} {case.shape!s:20} {ours:9,.0f} us {times:6.2f}", flush=True)
    for dtype in DTYPES:
        for layout in ("NCHW", "channels-last", "NC"):
            for family in ("grid", "tiny"):
                if (family, dtype, layout) in ratios:
                    values = np.array(ratios[family, dtype, layout])
                    mean = np.exp(np.log(values).mean())
                    print(f"{family}, {dtype} {layout}: {mean:.2f} on average, least {values.min():.2f}")


if __name__ == "__main__":
    main()
