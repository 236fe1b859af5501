"""`BatchNorm` over named dimensions, as RETURNN-common's issue 89 sketches it, on `xarray.DataArray`.

Faults of the original that the default does not have: gamma and beta are created but never applied; the running
variance starts at 0, so evaluation before any training divides by sqrt(epsilon); NaN or Inf in one batch stays in the
running statistics forever (here such a batch does not update them); it is not valid Python. `faithful=True` reproduces
all but the last.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from batchnorm.configuration import import_error

if (error := import_error(__name__, "xarray")) is not None:
    raise error

from xarray import DataArray

from batchnorm.compat.arguments import check_number
from batchnorm.compat.returnn_context import current_run, run_ctx
from batchnorm.compat.returnn_source import check_field, feature_dimension, mask_of, statistics_as_written
from batchnorm.compat.storage import batch_norm, storable
from batchnorm.conventions import CONVENTIONS, resolve
from batchnorm.core.running import RunningStatistics

__all__ = ["BatchNorm", "run_ctx"]

AS_WRITTEN = CONVENTIONS["returnn-common-demo"]
MENDED = replace(AS_WRITTEN, affine="plain", initial_spread=1.0)


class BatchNorm:
    """Normalize each index of the feature dimension over all other dimensions.

        training    y = gamma * (source - batch mean) / sqrt(batch var + epsilon) + beta
        else        y = gamma * (source - mean) / sqrt(var + epsilon) + beta
        update      mean <- mean + momentum * (batch mean - mean), and var likewise

    A call within `run_ctx(train=True)` trains; the update is made when that block ends.

    A dimension is dynamic if the source has a coordinate with its lengths: only that many leading elements enter the
    statistics, and padding is normalized like the rest. y has the same coordinate. For (batch, time, feature):

        source = source.assign_coords(lengths_of_time=("batch", [7, 4, 1]))

    `mean`, `var`, `gamma` and `beta` are DataArrays along the feature dimension, None until the first call unless set.

    Args:
        in_dim: Name of the feature dimension; None is the last dimension of the first source.
        affine: Whether the layer has gamma and beta.
        faithful: As the original does, apply neither gamma nor beta, start var at 0, and let NaN enter mean and var.

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
            TypeError: The source or a field is not a DataArray of floats, or lengths are not integers.
            ValueError: The feature dimension, its size or its labels differ from before, or a number is out of range.
            RuntimeError: JAX traces the call, so there are no values to store; or the `run_ctx` block has ended.
        """
        in_dim = feature_dimension(source, self.in_dim)
        check_number("epsilon", epsilon, "added to the variance")
        check_number("momentum", momentum, "the weight of the batch", most=1)
        mask, run = mask_of(source, in_dim), current_run()
        self._lazy_init(source, in_dim)
        running = RunningStatistics(self.mean.data, self.var.data)
        if run.train:  # from state 0 with decay 0: the state after a batch is its own statistics, unrounded
            running = RunningStatistics.initial(source.sizes[in_dim], AS_WRITTEN, like=source.data)
        y: DataArray
        y, batch = batch_norm(
            (source, self.gamma, self.beta), running, training=run.train, axis=source.get_axis_num(in_dim),
            convention=resolve(AS_WRITTEN if self.faithful else MENDED, epsilon, 0.0, None, None), mask=mask,
            warn=(lambda: None) if self.faithful else None,
        )  # fmt: skip
        if run.train:
            batch = batch.map(lambda value: storable("mean and var", value, "train outside of it"))
            if self.faithful and batch.skipped:
                batch = statistics_as_written(source, in_dim, mask)
            run.add(partial(self._update, batch, momentum))
        return y

    def _lazy_init(self, source: DataArray, in_dim: Any) -> None:
        """Check the fields against the source, then fix the feature dimension and create the fields that are None."""
        for name in ("mean", "var", "gamma", "beta"):
            check_field(name, getattr(self, name), source, in_dim)
        labels = {in_dim: source.coords[in_dim]} if in_dim in source.coords else {}
        zeros = RunningStatistics.initial(source.sizes[in_dim], AS_WRITTEN, like=source.data).mean
        initial = {"mean": 0.0, "var": 0.0 if self.faithful else 1.0}
        made = {
            name: DataArray(storable(name, zeros + value, "call the layer once outside of it"), labels, (in_dim,), name)
            for name, value in (initial | ({"gamma": 1.0, "beta": 0.0} if self.affine else {})).items()
            if getattr(self, name) is None
        }
        vars(self).update(made, in_dim=in_dim)

    def _update(self, batch: RunningStatistics, momentum: float) -> None:
        """Update mean and var, unless the batch's statistics are not finite or it has no valid element."""
        if batch.steps:
            self.mean = self.mean.copy(data=self.mean.data + momentum * (batch.mean - self.mean.data))
            self.var = self.var.copy(data=self.var.data + momentum * (batch.spread - self.var.data))
