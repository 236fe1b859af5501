"""The signatures of the constructors of nnx, in which `inspect` finds every option."""

import inspect
from collections.abc import Callable
from typing import Any


class OwnSignature:
    """`__signature__` of a class: that of its constructor, where the metaclass of nnx would show *args, **kwargs."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        """The signature of the class, or of a subclass by its own constructor."""
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def with_options_of(base: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for a constructor whose `**options` are those of another: its signature shows them all."""

    def decorate(constructor: Callable[..., None]) -> Callable[..., None]:
        inherited = inspect.signature(base).parameters
        own = inspect.signature(constructor).parameters.values()
        added = [one for one in own if one.name not in inherited and one.kind is inspect.Parameter.KEYWORD_ONLY]
        constructor.__signature__ = inspect.Signature([*inherited.values(), *added])  # type: ignore[attr-defined]
        return constructor

    return decorate
