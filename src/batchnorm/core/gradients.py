"""The backward rule."""

from batchnorm.core.axes import Axes
from batchnorm.core.dtypes import Array, Namespace, accumulation_dtype, cast
from batchnorm.core.normalize import Statistics


def gradients(
    xp: Namespace,
    dy: Array,
    x: Array,
    axes: Axes,
    statistics: Statistics,
    count: Array,
    gamma: Array | None = None,
    mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of the normalization by batch statistics, eps inside the root.

        dbeta = sum(dy)     dgamma = sum(dy * xhat)
        dx    = gamma * rstd * (dy - dbeta / count - xhat * dgamma / count)

    For each channel dx is affine in dy and x, dx = a*dy + b*(x - mean) + c, so xhat is formed for the sum only.

    Args:
        xp: Namespace of the arrays.
        dy: Gradient of y; already zero where masked.
        x: The input; where masked it may hold anything.
        axes: The split of its axes.
        statistics: The statistics that normalized x.
        count: Elements behind the statistics of each channel.
        gamma: Factor, or None for 1.
        mask: Booleans that broadcast to x; dx is 0 outside it.

    Returns:
        dx, dgamma, dbeta in the dtype of the statistics.
    """
    mean, mean_lo, rstd = (axes.expand_to_x(xp, statistic) for statistic in statistics)
    wide = accumulation_dtype(xp, x)

    def total(values: Array) -> Array:
        return cast(xp, axes.sum_reduced(xp, values, wide), rstd.dtype)

    dy = cast(xp, dy, rstd.dtype)
    deviation = cast(xp, x, rstd.dtype) - mean
    if mask is not None:
        deviation = xp.where(mask, deviation, mean_lo)
    dbeta = total(dy)
    dgamma = total(dy * ((deviation - mean_lo) * rstd))
    n = axes.expand_to_x(xp, xp.maximum(cast(xp, count, rstd.dtype), xp.ones_like(statistics.rstd)))
    a = rstd if gamma is None else axes.expand_to_x(xp, cast(xp, gamma, rstd.dtype)) * rstd
    b = -a * rstd * dgamma / n
    c = -a * dbeta / n - b * mean_lo
    dx = a * dy + (b * deviation + c)
    if mask is not None:
        dx = xp.where(mask, dx, 0.0)
    return dx, axes.squeeze_reduced(xp, dgamma), axes.squeeze_reduced(xp, dbeta)


def gradients_by_state(
    xp: Namespace,
    dy: Array,
    x: Array,
    axes: Axes,
    statistics: Statistics,
    gamma: Array | None = None,
    is_read: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of the normalization by statistics that do not depend on x.

        dbeta = sum(dy)     dgamma = sum(dy * xhat)     dx = gamma * rstd * dy

    Args:
        xp: Namespace of the arrays.
        dy: Gradient of y; already zero where masking made y 0.
        x: The input.
        axes: The split of its axes.
        statistics: The statistics that normalized x.
        gamma: Factor, or None for 1.
        is_read: Booleans that broadcast to x, or None for True; where False, xhat was 0 and dx is 0.

    Returns:
        dx, dgamma, dbeta in the dtype of the statistics.
    """
    mean, mean_lo, rstd = (axes.expand_to_x(xp, statistic) for statistic in statistics)
    wide = accumulation_dtype(xp, x)
    dy = cast(xp, dy, rstd.dtype)
    xhat = ((cast(xp, x, rstd.dtype) - mean) - mean_lo) * rstd
    dx = dy * (rstd if gamma is None else axes.expand_to_x(xp, cast(xp, gamma, rstd.dtype)) * rstd)
    if is_read is not None:
        xhat, dx = xp.where(is_read, xhat, 0.0), xp.where(is_read, dx, 0.0)
    dgamma, dbeta = (cast(xp, axes.sum_reduced(xp, values, wide), rstd.dtype) for values in (dy * xhat, dy))
    return dx, axes.squeeze_reduced(xp, dgamma), axes.squeeze_reduced(xp, dbeta)
