"""The cases to measure: operations, dtypes, memory layouts and shapes, and their combinations."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from batchnorm.training.network import LAYERS

OPERATIONS = {
    "forward": "training forward",
    "forward+backward": "training forward and backward",
    "inference": "normalized by running statistics",
    "relu": "batch norm and ReLU, forward and backward",
    "add+relu": "batch norm, added residual and ReLU, forward and backward",
    "forward-out": "training forward into an array that is given",
}
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of an element
LAYOUTS = {
    "NCHW": "images, channels first",
    "channels-last": "the same images, channels last in memory",
    "NC": "rows of features",
    "masked": "sequences (N, T, C), of which a quarter is padding on average",
}
FAMILIES = {
    "grid": "every batch norm of ResNet-50, 32 images of 224 x 224",
    "lenet": "those of `batchnorm train`",
    "tall": "many rows, few features",
    "sequences": "masked sequences",
    "tiny": "next to no work: what a call costs",
    "huge": "one tensor of 411 MB",
}

GRID_LIMIT = 32 * 2**20  # bytes of x; above, each fresh result causes page faults
BATCH = 32

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One case to measure; `shape` is (N, C, H, W) in either image layout, (N, C), or masked (N, T, C)."""

    family: str
    operation: str
    dtype: str
    layout: str
    shape: Shape

    @property
    def axis(self) -> int:
        """The axis of the channels in `shape`."""
        return 2 if self.layout == "masked" else 1

    @property
    def channels(self) -> int:
        """The number of channels C."""
        return self.shape[self.axis]

    @property
    def bytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    @property
    def has_backward(self) -> bool:
        """Whether gradients are computed too."""
        return self.operation in ("forward+backward", "relu", "add+relu")

    @property
    def has_residual(self) -> bool:
        """Whether a residual is added before the activation."""
        return self.operation == "add+relu"

    @property
    def is_in_grid(self) -> bool:
        """Whether the targets cover it as part of the grid: ResNet-50's shapes up to 32 MB."""
        return self.family == "grid" and self.bytes <= GRID_LIMIT

    def __str__(self) -> str:
        return f"{self.operation} {self.dtype} {self.layout} {self.shape}"


def resnet50(batch: int = BATCH, image: int = 224) -> tuple[Shape, ...]:
    """The distinct inputs of ResNet-50's batch norms, in the order in which they first occur.

    A bottleneck of width w has convolutions 1x1 to w channels, 3x3 (with the stage's stride in its first block) and 1x1
    to 4w channels. A batch norm follows each of them, and the projection in the first block of a stage.

    Source: He et al. 2016, table 1, with the stride in the 3x3 as in every framework's model (torchvision 0.20,
    models/resnet.py).

    Example:
        >>> resnet50()[:2]
        ((32, 64, 112, 112), (32, 64, 56, 56))
    """
    side = image // 2
    shapes = [(batch, 64, side, side)]
    side //= 2  # the max pooling
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            shapes.append((batch, width, side, side))
            side //= stride if block == 0 else 1
            shapes += [(batch, width, side, side), (batch, 4 * width, side, side)]
    return tuple(dict.fromkeys(shapes))


def lenet() -> tuple[Shape, ...]:
    """The inputs of LeNet's batch norms: batches of 64 for the convolutions, of 256 for the dense layers."""
    shapes: list[Shape] = []
    side = 28
    for layer in LAYERS[:-1]:
        if layer.kernel:
            side += 1 - layer.kernel
            shapes.append((64, layer.outputs, side, side))
            side //= 2
        else:
            shapes.append((256, layer.outputs))
    return tuple(shapes)


IMAGE_OPERATIONS = tuple(OPERATIONS)
ROW_OPERATIONS = ("forward", "forward+backward", "inference", "relu")
TRAINING = ("forward", "forward+backward")


def all_cases() -> list[Case]:
    """Every case of the full run, the grid first."""
    cases = [*_images("grid", resnet50(), IMAGE_OPERATIONS)]
    cases += _images("lenet", [shape for shape in lenet() if len(shape) == 4], ("forward", "forward+backward", "relu"))
    cases += _rows("lenet", [shape for shape in lenet() if len(shape) == 2], ROW_OPERATIONS)
    cases += _rows("tall", [(65536, 64), (16384, 256)], ROW_OPERATIONS)
    for shape in ((32, 64, 64), (32, 256, 512)):
        cases += [Case("sequences", operation, dtype, "masked", shape) for operation in TRAINING for dtype in DTYPES]
    cases += [Case("tiny", operation, "float32", "NC", (2, 3)) for operation in TRAINING]
    cases += [Case("tiny", operation, "float32", "NCHW", (2, 3, 4, 4)) for operation in TRAINING]
    cases += [Case("huge", operation, "float32", "NCHW", (BATCH, 256, 112, 112)) for operation in TRAINING]
    return cases


def quick_cases() -> list[Case]:
    """A case of each kind, for under a minute: only (32, 256, 14, 14) of the grid, the first shape of the others."""
    first: dict[tuple[str, ...], Case] = {}
    for case in all_cases():
        if case.family == "grid" and case.shape != (BATCH, 256, 14, 14):
            continue
        if case.family != "grid" and (case.operation not in TRAINING or case.dtype != "float32"):
            continue
        if case.family == "huge" and case.has_backward:
            continue
        first.setdefault((case.family, case.operation, case.dtype, case.layout), case)
    return list(first.values())


def _images(family: str, shapes: list[Shape] | tuple[Shape, ...], operations: tuple[str, ...]) -> Iterator[Case]:
    for operation in operations:
        for dtype in DTYPES:
            if operation == "forward-out" and dtype != "float32":
                continue
            for layout in ("NCHW", "channels-last"):
                yield from (Case(family, operation, dtype, layout, shape) for shape in shapes)


def _rows(family: str, shapes: list[Shape], operations: tuple[str, ...]) -> Iterator[Case]:
    for operation in operations:
        for dtype in DTYPES:
            yield from (Case(family, operation, dtype, "NC", shape) for shape in shapes)
