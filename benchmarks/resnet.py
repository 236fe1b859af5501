"""The effect of replacing a ResNet-50's batch norms on training on a CPU: losses, the time of a step, peak memory.

    python -m benchmarks.resnet                     # everything; some ten minutes on two cores
    python -m benchmarks.resnet --only time --layout channels-last

The network is `transformers`' own, randomly initialized; the images are noise.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

import batchnorm.torch as bnt
from benchmarks.vision import load_torchvision

BATCH, SIZE, CLASSES = 16, 64, 10
VARIANTS = ("native", "replaced", "fused")


def network(variant: str, dtype: torch.dtype, *, is_nudged: bool = False) -> nn.Module:
    """A ResNet-50; `is_nudged` moves one gamma by one unit in the last place."""
    load_torchvision()  # transformers imports it if it is installed
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model: nn.Module = ResNetForImageClassification(ResNetConfig(num_labels=CLASSES)).to(dtype).train()
    if is_nudged:
        gamma = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight
        with torch.no_grad():
            gamma[0] = torch.nextafter(gamma[0], torch.tensor(2.0, dtype=dtype))
    if variant != "native":
        example = torch.randn(2, 3, SIZE, SIZE) if variant == "fused" else None
        bnt.replace(model, fuse=example is not None, example=example)
    return model


def stepper(model: nn.Module, dtype: torch.dtype, layout: str) -> Callable[[], float]:
    """A function that runs a training step and returns its loss."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    model.to(memory_format=memory_format)  # type: ignore[call-overload]

    def step() -> float:
        images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator, dtype=dtype).contiguous(
            memory_format=memory_format
        )
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


def losses(variant: str, dtype: torch.dtype, steps: int, *, is_nudged: bool = False) -> np.ndarray[Any, Any]:
    """The losses of the first `steps` steps."""
    step = stepper(network(variant, dtype, is_nudged=is_nudged), dtype, "NCHW")
    return np.array([step() for _ in range(steps)])


def compare_losses() -> None:
    """Print the gaps to native losses: about 0 in float64, in float32 no larger than those of a nudged native run."""
    for variant in VARIANTS[1:]:
        gap = np.abs(losses(variant, torch.float64, 5) - losses("native", torch.float64, 5)).max()
        print(f"float64, {variant}: largest gap over 5 steps {gap:.1e}")
    native = losses("native", torch.float32, 20)
    nudged = np.abs(losses("native", torch.float32, 20, is_nudged=True) - native)
    print(f"float32, native with one gamma moved by an ulp: first {nudged[0]:.1e}, largest of 20 {nudged.max():.1e}")
    for variant in VARIANTS[1:]:
        gap = np.abs(losses(variant, torch.float32, 20) - native)
        print(f"float32, {variant}: first {gap[0]:.1e}, largest of 20 {gap.max():.1e}")


def share_of_batch_norms(step: Callable[[], float]) -> float:
    """The share of batch norms in a step, forward and backward, by PyTorch's profiler."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = perf_counter()
        for _ in range(3):
            step()
        seconds = perf_counter() - start
    names = {"aten::batch_norm", "NativeBatchNormBackward0", "Normalization", "NormalizationBackward"}
    return float(sum(event.cpu_time_total for event in profile.key_averages() if event.key in names) / 1e6 / seconds)


def compare_times(layout: str, rounds: int) -> None:
    """Print the median time of a step, with the variants in turns, and the share of the batch norms."""
    steps = {variant: stepper(network(variant, torch.float32), torch.float32, layout) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for step in steps.values():
        step()
    for number in range(rounds):
        for variant in VARIANTS[number % 3 :] + VARIANTS[: number % 3]:
            start = perf_counter()
            steps[variant]()
            times[variant].append(perf_counter() - start)
    for variant in VARIANTS:
        share = share_of_batch_norms(steps[variant])
        median, usual = np.median(times[variant]), np.median(times["native"])
        ratio = f"{usual / median:.2f} times as fast"
        print(f"{layout}, {variant}: {1e3 * median:.0f} ms a step, {ratio}; batch norms {share:.0%}")


def peak_memory(variant: str) -> int:
    """Peak memory of three steps, in a separate process, in MiB above that before the first step."""
    program = f"from benchmarks.resnet import measure_memory; measure_memory({variant!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def measure_memory(variant: str) -> None:
    """Print this process's peak memory in MiB above that before the first step."""
    step = stepper(network(variant, torch.float32), torch.float32, "NCHW")
    before = memory("VmRSS")
    for _ in range(3):
        step()
    print(memory("VmHWM") - before)


def memory(name: str) -> int:
    """A memory figure of this process as Linux reports it, in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) // 1024


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("losses", "time", "memory"), action="append")
    parser.add_argument("--layout", choices=("NCHW", "channels-last"), action="append")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    wanted = options.only or ("losses", "time", "memory")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, {SIZE}x{SIZE} images")
    if "time" in wanted:
        for layout in options.layout or ("NCHW", "channels-last"):
            compare_times(layout, options.rounds)
    if "memory" in wanted:
        for variant in VARIANTS:
            print(f"peak memory of training steps, {variant}: {peak_memory(variant)} MiB")
    if "losses" in wanted:
        compare_losses()


if __name__ == "__main__":
    main()
