"""Batch normalization, done once: exact, fast, and fluent in every framework's convention."""

from batchnorm.configuration import show_config
from batchnorm.convention import Convention
from batchnorm.conventions import CONVENTIONS
from batchnorm.core.moments import Moments
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import advance, affine, backward, batch_norm, forward, moments
from batchnorm.kernels.generic import Cache, Gradients
from batchnorm.kernels.registry import set_num_threads

__version__ = "0.1.0"
__all__ = [
    "CONVENTIONS",
    "Cache",
    "Convention",
    "Gradients",
    "Moments",
    "RunningStatistics",
    "advance",
    "affine",
    "backward",
    "batch_norm",
    "forward",
    "moments",
    "set_num_threads",
    "show_config",
]
