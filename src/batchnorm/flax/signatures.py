"""Signatures of the nnx constructors, which show every option to `inspect`."""

import inspect
from collections.abc import Callable
from typing import Any


class OwnSignature:
    """Descriptor for `__signature__`: the constructor's, because the metaclass of nnx would show *args, **kwargs."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        """The signature of the constructor of `owner`, without self."""
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def with_options_of(base: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a constructor so that its signature shows its `**options` as the parameters of `base`."""

    def decorate(constructor: Callable[..., None]) -> Callable[..., None]:
        inherited = inspect.signature(base).parameters
        own = inspect.signature(constructor).parameters.values()
        added = [one for one in own if one.name not in inherited and one.kind is inspect.Parameter.KEYWORD_ONLY]
        constructor.__signature__ = inspect.Signature([*inherited.values(), *added])  # type: ignore[attr-defined]
        return constructor

    return decorate
