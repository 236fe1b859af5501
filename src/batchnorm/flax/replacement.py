"""Conversion of the batch norms of existing `flax.nnx` models to this library's, in place, and back."""

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
    """Convert every `flax.nnx.BatchNorm` of a model to this library's class, in place; `restore` undoes it.

    The modules remain the same objects with the same `Param`s and `BatchStat`s, shared modules included, so that
    optimizers and checkpoints stay valid. They are still instances of Flax's class. The result of an earlier
    `nnx.split` still merges to Flax's layers. Networks of `flax.linen` create their layers anew at each call: use
    `replaced`.

    Args:
        model: An `nnx.Module`, which may be a batch norm, or a list, dictionary or other tree of modules.

    Returns:
        The model.

    Raises:
        TypeError: The model has no nnx module except possibly `nnx.bridge.ToNNX`, which wraps a `flax.linen` module.

    Warns:
        UserWarning: A batch norm is not converted: a subclass of `flax.nnx.BatchNorm` that overrides `__call__` or has
            an attribute named like an added option (`activation`, `convention`, `kernel`, `count_skipped`); or the
            batch norms of a `flax.linen` network within the model.

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
    """The reason why a part of a model cannot be converted; None if it can be, or already is."""
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
    """Convert the batch norms of a model back to Flax's own classes, in place: the inverse of `replace`.

    Layers that were constructed as `batchnorm.flax.nnx.BatchNorm` are left unchanged. Added options that were assigned
    to converted layers are dropped.

    Args:
        model: An `nnx.Module`, or a list, dictionary or other tree of modules.

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


#: The class that replaces Flax's, and that of each of its subclasses converted so far.
OURS: dict[type[nnx.BatchNorm], type[nnx.BatchNorm]] = {nnx.BatchNorm: BatchNorm}


def ours_of(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """The class that replaces Flax's or a subclass of it; other methods and attributes of a subclass are kept."""
    if kind in OURS:
        return OURS[kind]
    members = {
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "_original": kind
    }  # fmt: skip
    # Under the name of the class, pickle would find `kind`: a reducer for the metaclass takes precedence.
    metaclass = type(type(kind).__name__, (type(kind),), {})
    copyreg.pickle(metaclass, reduced)
    OURS[kind] = types.new_class(
        kind.__name__, (kind, BatchNorm), {"metaclass": metaclass}, lambda namespace: namespace.update(members)
    )
    return OURS[kind]


def original_of(kind: type) -> Any:
    """The class that `replace` converted to `kind`; None if `replace` did not create `kind`."""
    return nnx.BatchNorm if kind is BatchNorm else vars(kind).get("_original")


def reduced(kind: type) -> Any:
    """Pickle a class of `ours_of` by the class that it replaces, and a subclass of one by name."""
    original = original_of(kind)
    return kind.__qualname__ if original is None else (ours_of, (original,))


def batch_norms(model: Any) -> list[tuple[str, Any]]:
    """List the nnx batch norms of a model, each once, with their names, and the linen modules that may contain some.

    Raises:
        TypeError: The model has no nnx module other than wrappers of linen modules.
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
    """Whether a linen module is a layer of Flax's own that cannot contain a batch norm."""
    is_container = isinstance(module, (linen.BatchNorm, linen.Sequential))
    return type(module).__module__.startswith("flax.linen.") and not is_container
