"""`BatchNorm` over named dimensions, as RETURNN-common's issue 89 sketches it, on `xarray.DataArray`.

Faults of the original that the default does not have: gamma and beta are made and never applied; the running variance
starts at 0, so that an evaluation before any training divides by sqrt(epsilon); it is not valid Python. `faithful=True`
reproduces the first two.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from batchnorm.configuration import import_error

if (error := import_error(__name__, "xarray")) is not None:
    raise error

import xarray
from xarray import DataArray

from batchnorm.compat.returnn_context import CONTEXT, feature_dimension, mask_of, run_ctx
from batchnorm.compat.shared import storable
from batchnorm.conventions import CONVENTIONS, resolve
from batchnorm.core.running import RunningStatistics
from batchnorm.functional import batch_norm

__all__ = ["BatchNorm", "run_ctx"]

AS_WRITTEN = CONVENTIONS["returnn-common-demo"]
MENDED = replace(AS_WRITTEN, affine="plain", initial_spread=1.0)


class BatchNorm:
    """Normalize each index of the feature dimension over all other dimensions.

        training    y = gamma * (source - batch mean) / sqrt(batch var + epsilon) + beta
        else        y = gamma * (source - mean) / sqrt(var + epsilon) + beta
        update      mean <- mean + momentum * (batch mean - mean), and var likewise

    Training is a call within `run_ctx(train=True)`, and the update is made when that ends.

    A dimension is dynamic if the source has a coordinate with its lengths: only so many leading elements enter the
    statistics, and padding is normalized like the rest. y has the coordinate as well. For (batch, time, feature):

        source = source.assign_coords(lengths_of_time=("batch", [7, 4, 1]))

    `mean`, `var`, `gamma` and `beta` are DataArrays along the feature dimension, None until the first call unless set.

    Args:
        in_dim: Name of the feature dimension; None is the last one of the source of the first call.
        affine: Whether there are gamma and beta.
        faithful: As the original does, apply neither gamma nor beta, and start var at 0.

    Example:
        >>> import xarray
        >>> from batchnorm.compat.returnn import BatchNorm, run_ctx
        >>> norm, source = BatchNorm(), xarray.DataArray([[1.0, 10.0], [3.0, 30.0]], dims=("batch", "feature"))
        >>> with run_ctx(train=True):
        ...     y = norm(source)
        >>> y.values.round(3).tolist(), norm.mean.values.tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [0.2, 2.0])
    """

    mean: Any = None
    var: Any = None
    gamma: Any = None
    beta: Any = None

    def __init__(self, in_dim: str | None = None, affine: bool = True, *, faithful: bool = False) -> None:
        self.in_dim, self.affine, self.faithful = in_dim, affine, faithful

    def __call__(self, source: DataArray, *, epsilon: float = 1e-5, momentum: float = 0.1) -> DataArray:
        """y, with the dimensions, coordinates and attributes of the source.

        Raises:
            TypeError: Not a DataArray of floats, or lengths that are not integers.
            ValueError: The feature dimension, its size or its labels are not those of before; or a number does not fit.
            RuntimeError: JAX is tracing the call, and the layer would keep what it traces.
        """
        in_dim = feature_dimension(source, self.in_dim)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum!r}; it is the weight of the batch and must lie in 0 to 1")
        record = resolve(AS_WRITTEN if self.faithful else MENDED, epsilon, 0.0, None, None)
        mask = mask_of(source, in_dim)
        self._lazy_init(source, in_dim)
        train, updates = CONTEXT.get()
        running = RunningStatistics(self.mean.data, self.var.data)
        if train:  # from a state of 0 with a decay of 0: the state after a batch is the batch's own, without rounding
            running = RunningStatistics.initial(source.sizes[in_dim], AS_WRITTEN, like=source.data)
        y: DataArray
        y, batch = batch_norm(
            source, self.gamma, self.beta, running, training=train, convention=record,
            axis=source.get_axis_num(in_dim), mask=mask,
        )  # fmt: skip
        if train:
            batch = batch.map(lambda value: storable("mean and var", value, "train outside of it"))
            updates.append(partial(self._update, batch, momentum))
        return y

    def _lazy_init(self, source: DataArray, in_dim: Any) -> None:
        """Fix the feature dimension with its labels, and make what is None; later, compare with them."""
        labels = {in_dim: source.coords[in_dim]} if in_dim in source.coords else {}
        initial = {"mean": 0.0, "var": 0.0 if self.faithful else 1.0}
        for name, value in (initial | ({"gamma": 1.0, "beta": 0.0} if self.affine else {})).items():
            if getattr(self, name) is None:
                zeros = RunningStatistics.initial(source.sizes[in_dim], AS_WRITTEN, like=source.data).mean
                values = storable(name, zeros + value, "call the layer once outside of it")
                setattr(self, name, DataArray(values, labels, (in_dim,), name))
            try:
                xarray.align(source, getattr(self, name), join="exact", copy=False)
            except ValueError as error:
                message = f"source and {name} differ along {in_dim!r}; select the labels in order, or set {name} anew"
                raise ValueError(f"{message}: {error}") from error
        self.in_dim = in_dim

    def _update(self, batch: RunningStatistics, momentum: float) -> None:
        """Take in a batch, unless its statistics are not finite or nothing in it counts."""
        if batch.steps:
            self.mean = self.mean.copy(data=self.mean.data + momentum * (batch.mean - self.mean.data))
            self.var = self.var.copy(data=self.var.data + momentum * (batch.spread - self.var.data))
