"""A context in which this library computes the batch norms of existing `flax.linen` networks."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flax import linen
from flax.linen.module import InterceptorContext

from batchnorm.flax.linen import BatchNorm, has_complex_numbers, normalize


@dataclass
class Report:
    """The batch norms that were called within `replaced`.

    Attributes:
        replaced: Paths of the layers that this library computed.
        kept: Paths of the layers that Flax or a subclass computed, with the reasons.
    """

    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


class Interception(ContextDecorator):
    """The context of `replaced`; each entry creates a new report."""

    def __init__(self) -> None:
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> Report:
        report = Report()
        context = linen.intercept_methods(partial(intercept, report))
        context.__enter__()
        self.entered.append(context)
        return report

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def replaced() -> Interception:
    """A context in which every `flax.linen.BatchNorm` of any network computes as `batchnorm.flax.linen.BatchNorm`.

    Variables are unchanged: `init`, `apply`, checkpoints and optimizers work as before. Works with `jit`, `grad` and
    lifted transformations, and takes effect when they trace: a function compiled before the context keeps Flax's
    layers, and one compiled within it keeps the replacement. A subclass that overrides `__call__` keeps its own, and
    Flax computes complex input. A momentum or epsilon that only Flax accepts raises an error at the call.

    Like all of Flax's interceptors, it acts only in the thread that enters it, not in threads started within. In nested
    contexts the outermost computes, and the reports of the inner ones stay empty.

    Returns:
        A reusable context manager whose `Report` records every batch norm that is called.

    Example:
        >>> import flax.linen, jax, jax.numpy as jnp, batchnorm.flax
        >>> network = flax.linen.Sequential([flax.linen.Dense(3), flax.linen.BatchNorm(use_running_average=False)])
        >>> with batchnorm.flax.replaced() as report:
        ...     y, variables = network.init_with_output(jax.random.key(0), jnp.ones((4, 2)))
        >>> report.replaced
        ['layers_1']
    """
    return Interception()


def intercept(
    report: Report,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    context: InterceptorContext,
) -> Any:
    """Intercept the method calls of linen: compute those of Flax's batch norms, and record them in `report`."""
    layer = context.module
    if context.method_name != "__call__" or isinstance(layer, BatchNorm) or not isinstance(layer, linen.BatchNorm):
        return call(*args, **options)
    path = "/".join(layer.path) or type(layer).__name__
    if type(layer).__call__ is not linen.BatchNorm.__call__:
        report.kept[path] = f"{name_of(type(layer))} has a __call__ of its own"
        return call(*args, **options)
    if has_complex_numbers(layer, x_of(*args, **options)):
        report.kept[path] = "x is complex"
        return call(*args, **options)
    if path not in report.replaced:
        report.replaced.append(path)
    return as_ours(layer, *args, **options)


def x_of(x: Any, *args: Any, **kwargs: Any) -> Any:
    """The first argument of a layer's call."""
    return x


def as_ours(layer: linen.BatchNorm, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
    """Compute the call of Flax's layer by this library."""
    return normalize(layer, x, use_running_average, mask=mask)


def name_of(kind: type) -> str:
    """The qualified name of a class, with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"
