"""Batch norm for PyTorch: drop-in `torch.nn` layers, faster on a CPU, with features that PyTorch's layers lack."""

from batchnorm.configuration import import_error

if error := import_error(__name__, "torch", needs_extension=True):
    raise error

from batchnorm.torch.accumulation import accumulate
from batchnorm.torch.freezing import freeze, no_update, unfreeze
from batchnorm.torch.functional import batch_norm
from batchnorm.torch.general import BatchNorm
from batchnorm.torch.insertion import add_batch_norm, with_batch_norm
from batchnorm.torch.layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from batchnorm.torch.replacement import Report, replace, restore, restored
from batchnorm.torch.reports import LayerReport, ModelReport, report
from batchnorm.torch.sync import SyncBatchNorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LayerReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "ModelReport",
    "Report",
    "SyncBatchNorm",
    "accumulate",
    "add_batch_norm",
    "batch_norm",
    "freeze",
    "no_update",
    "replace",
    "report",
    "restore",
    "restored",
    "unfreeze",
    "with_batch_norm",
]
