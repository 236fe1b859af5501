"""Models of `flax.nnx` by other people: their batch norms made ours in place, and back."""

import copyreg
import types
import warnings
from typing import Any, TypeVar

from flax import linen, nnx

from batchnorm.flax.interception import name_of
from batchnorm.flax.nnx import BatchNorm
from batchnorm.flax.options import Own

Model = TypeVar("Model")


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
        TypeError: The model has no module of nnx but perhaps `nnx.bridge.ToNNX`, which wraps one of `flax.linen`.

    Warns:
        UserWarning: A batch norm stays as it is: a subclass of `flax.nnx.BatchNorm` with a `__call__` of its own, or
            with an attribute that would be an option of ours (`activation`, `convention`, `kernel`, `count_skipped`);
            or those of a network of `flax.linen` within the model.

    Example:
        >>> from flax import nnx
        >>> import batchnorm.flax
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> isinstance(batchnorm.flax.replace(model).layers[1], batchnorm.flax.nnx.BatchNorm)
        True
    """
    kept: dict[str, list[str]] = {}
    for name, part in batch_norms(model):
        reason = reason_to_keep(part)
        if reason is not None:
            kept.setdefault(reason, []).append(f"{name} ({name_of(type(part))})")
        elif not isinstance(part, BatchNorm):
            part.__class__ = ours_of(type(part))
    for reason, names in kept.items():
        warnings.warn(f"kept, as {reason}: {', '.join(names)}", stacklevel=2)
    return model


def reason_to_keep(part: Any) -> str | None:
    """Why a part of a model stays as it is; None for what is ours or can become so."""
    if isinstance(part, linen.Module):
        return "layers of flax.linen are made anew at each call (call the model within batchnorm.flax.replaced())"
    kind = type(part)
    if issubclass(kind, BatchNorm):
        return None
    if kind.__call__ is not nnx.BatchNorm.__call__:
        return "their class has a __call__ of its own"
    taken = [name for name in Own._fields if name in vars(part) or hasattr(kind, name)]
    return f"they have attributes of their own that would be options of ours, {' and '.join(taken)}" if taken else None


def restore(model: Model) -> Model:
    """Make the batch norms of a model Flax's own again, in place: the inverse of `replace`.

    Layers that were constructed as ours stay so. Options of ours that were assigned to the others are dropped.

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
        original = original_of(type(layer))
        if original is not None and not layer._is_constructed:
            for name in set(Own._fields) & set(vars(layer)):
                delattr(layer, name)
            layer.__class__ = original
    return model


#: Our class for Flax's and for each subclass of it that has been replaced.
OURS: dict[type[nnx.BatchNorm], type[nnx.BatchNorm]] = {nnx.BatchNorm: BatchNorm}


def ours_of(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """Our class for Flax's or for a subclass of it, whose other methods and attributes it keeps."""
    if kind in OURS:
        return OURS[kind]
    members = {
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "_original": kind
    }  # fmt: skip
    # Pickle would look for the class under its name, where `kind` is: it asks the metaclass first.
    metaclass = type(type(kind).__name__, (type(kind),), {})
    copyreg.pickle(metaclass, reduced)
    OURS[kind] = types.new_class(
        kind.__name__, (kind, BatchNorm), {"metaclass": metaclass}, lambda namespace: namespace.update(members)
    )
    return OURS[kind]


def original_of(kind: type) -> Any:
    """The class that the layers of a class had before `replace`; None where that has not made it."""
    return nnx.BatchNorm if kind is BatchNorm else vars(kind).get("_original")


def reduced(kind: type) -> Any:
    """What pickle writes of a class of `ours_of`; of a subclass of one, its name."""
    original = original_of(kind)
    return kind.__qualname__ if original is None else (ours_of, (original,))


def batch_norms(model: Any) -> list[tuple[str, Any]]:
    """The batch norms of nnx in a model, each once, with their names; and the modules of linen that may have some.

    Raises:
        TypeError: The model has no module of nnx, other than a wrapper of linen.
    """
    parts = [(".".join(map(str, path)) or type(node).__name__, node) for path, node in nnx.iter_graph(model)]
    linen_parts = [(name, node) for name, node in parts if isinstance(node, linen.Module)]
    if not any(isinstance(node, nnx.Module) and not isinstance(node, nnx.bridge.ToNNX) for _, node in parts):
        if linen_parts:
            raise TypeError(
                f"model {'is' if isinstance(model, linen.Module) else 'has only'} a flax.linen module, "
                f"{type(linen_parts[0][1]).__name__}, whose layers are made anew at each call; use the context "
                "batchnorm.flax.replaced() around init and apply, or the call of nnx.bridge.ToNNX"
            )
        raise TypeError(
            f"model is a {type(model).__name__} without a module of flax.nnx; it must be a flax.nnx.Module, or a list, "
            "dictionary or other tree of them"
        )
    return [
        *((name, node) for name, node in parts if isinstance(node, nnx.BatchNorm)),
        *((name, node) for name, node in linen_parts if not is_without_batch_norm(node)),
    ]


def is_without_batch_norm(module: linen.Module) -> bool:
    """Whether a module of linen is a plain layer of Flax's own."""
    is_container = isinstance(module, (linen.BatchNorm, linen.Sequential))
    return type(module).__module__.startswith("flax.linen.") and not is_container
