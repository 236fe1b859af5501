"""Networks of other people: Flax's batch norms computed by ours, and back."""

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flax import linen, nnx
from flax.linen.module import InterceptorContext

from batchnorm.flax.linen import BatchNorm, has_complex_numbers, normalize
from batchnorm.flax.nnx import BatchNorm as NnxBatchNorm

Model = TypeVar("Model")


@dataclass
class Report:
    """The layers that were called within `replaced`.

    Attributes:
        replaced: Paths of the layers that ours have computed.
        kept: Paths of batch norms that Flax or a class of their own has computed, each with the reason.
    """

    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


@contextmanager
def replaced() -> Iterator[Report]:
    """A context in which every `flax.linen.BatchNorm` of any network computes as `batchnorm.flax.linen.BatchNorm`.

    Variables are those of the network: `init`, `apply`, checkpoints and optimizers know no difference. Works with
    `jit`, `grad` and lifted transformations, while they trace: a function that was compiled before stays as it was, and
    one that is compiled within stays so afterwards. A subclass with a `__call__` of its own keeps it, and complex input
    is Flax's.

    Yields:
        A `Report`, to which every layer that is called is added.

    Example:
        >>> import flax.linen, jax, jax.numpy as jnp, batchnorm.flax
        >>> network = flax.linen.Sequential([flax.linen.Dense(3), flax.linen.BatchNorm(use_running_average=False)])
        >>> with batchnorm.flax.replaced() as report:
        ...     y, variables = network.init_with_output(jax.random.key(0), jnp.ones((4, 2)))
        >>> report.replaced
        ['layers_1']
    """
    report = Report()

    def intercept(
        call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], context: InterceptorContext
    ) -> Any:
        layer = context.module
        is_ours = isinstance(layer, BatchNorm)
        if context.method_name != "__call__" or is_ours or not isinstance(layer, linen.BatchNorm):
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

    with linen.intercept_methods(intercept):
        yield report


def x_of(x: Any, *args: Any, **kwargs: Any) -> Any:
    """The first argument of a layer's call."""
    return x


def as_ours(layer: linen.BatchNorm, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
    """The call of Flax's layer by ours."""
    return normalize(layer, x, use_running_average, mask=mask)


def name_of(kind: type) -> str:
    """The class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def replace(model: Model) -> Model:
    """Make every `flax.nnx.BatchNorm` of a model ours, in place; `restore` undoes it.

    The modules stay the same objects with the same `Param`s and `BatchStat`s, wherever in the model they are and
    however often: optimizers and checkpoints go on. They are instances of Flax's class still. What `nnx.split` returned
    before merges to what it was. For networks of `flax.linen`, which make their layers anew at each call, see
    `replaced`.

    Args:
        model: An `nnx.Module`, or a list, dictionary or other tree of them; a batch norm itself.

    Returns:
        The model.

    Raises:
        TypeError: The model is one of `flax.linen`.

    Warns:
        UserWarning: A subclass of `flax.nnx.BatchNorm` has a `__call__` of its own and stays as it is.

    Example:
        >>> from flax import nnx
        >>> import batchnorm.flax
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> isinstance(batchnorm.flax.replace(model).layers[1], batchnorm.flax.nnx.BatchNorm)
        True
    """
    kept = []
    for name, layer in batch_norms(model):
        kind = type(layer)
        if issubclass(kind, NnxBatchNorm):
            continue
        if kind.__call__ is not nnx.BatchNorm.__call__:
            kept.append(f"{name} ({name_of(kind)})")
            continue
        layer.__class__ = ours_of(kind)
    if kept:
        warnings.warn(f"kept, as their class has a __call__ of its own: {', '.join(kept)}", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Make the batch norms of a model Flax's own again, in place: the inverse of `replace`.

    Layers that were constructed as ours stay so.

    Args:
        model: What `replace` takes.

    Returns:
        The model.

    Example:
        >>> from flax import nnx
        >>> import batchnorm.flax
        >>> model = batchnorm.flax.replace(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> type(batchnorm.flax.restore(model)).__module__
        'flax.nnx.nn.normalization'
    """
    for _, layer in batch_norms(model):
        original = ORIGINALS.get(type(layer))
        if original is not None and "activation" not in vars(layer):  # the constructor sets it
            layer.__class__ = original
    return model


#: The class that a layer had before `replace`, by the class that it has since.
ORIGINALS: dict[type[nnx.BatchNorm], type[nnx.BatchNorm]] = {NnxBatchNorm: nnx.BatchNorm}


def ours_of(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """Our class for Flax's or for a subclass of it, whose other methods and attributes it keeps."""
    for known, original in ORIGINALS.items():
        if original is kind:
            return known
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    ours: type[nnx.BatchNorm] = types.new_class(
        kind.__name__, (kind, NnxBatchNorm), exec_body=lambda namespace: namespace.update(members)
    )
    ORIGINALS[ours] = kind
    return ours


def batch_norms(model: Any) -> list[tuple[str, nnx.BatchNorm]]:
    """The batch norms of nnx in a model, each once, with their names.

    Raises:
        TypeError: The model is one of `flax.linen`.
    """
    if isinstance(model, linen.Module):
        raise TypeError(
            f"model is a flax.linen module, {type(model).__name__}, whose layers are made anew at each call; use the "
            "context batchnorm.flax.replaced() around init and apply"
        )
    return [
        (".".join(map(str, path)) or type(node).__name__, node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.BatchNorm)
    ]
