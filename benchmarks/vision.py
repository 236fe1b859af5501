"""Importing torchvision."""

from types import ModuleType

from torch import library


def load_torchvision() -> ModuleType:
    """Import the package, even if its operators cannot be loaded into the installed build of PyTorch."""
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision
    module: ModuleType = torchvision
    return module
