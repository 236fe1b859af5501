"""Importing torchvision."""

from types import ModuleType

from torch import library


def load_torchvision() -> ModuleType:
    """The package, beside a build of PyTorch for which its own operators cannot be loaded, too."""
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision
    module: ModuleType = torchvision
    return module
