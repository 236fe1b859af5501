"""The convention records of the supported systems, by name."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from batchnorm.convention import Convention, MaskedOutput, Single
from batchnorm.conventions import frameworks, origins

__all__ = ["CONVENTIONS", "find", "resolve"]

#: The conventions by name. Each is tested against arrays computed by the system itself (`tests/golden`).
CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {record.name: record for record in (*origins.RECORDS, *frameworks.RECORDS)}
)


def find(convention: str | Convention) -> Convention:
    """The record called `convention`, or the record itself.

    Raises:
        ValueError: No record has that name; the message names the nearest.
        TypeError: Neither a name nor a record.
    """
    if isinstance(convention, Convention):
        return convention
    if not isinstance(convention, str):
        raise TypeError(f"convention is a {type(convention).__name__}; pass a name or a batchnorm.Convention")
    if convention not in CONVENTIONS:
        nearest = difflib.get_close_matches(convention.lower(), CONVENTIONS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, nearest))}? Known" if nearest else "known"
        raise ValueError(f"no convention is called {convention!r}; {hint} are {', '.join(CONVENTIONS)}")
    return CONVENTIONS[convention]


def resolve(
    convention: str | Convention,
    eps: float | None,
    decay: float | None,
    single: Single | None,
    masked_output: MaskedOutput | None,
) -> Convention:
    """The convention with a call's arguments in place of its own values, validated; None keeps the convention's."""
    if eps is None and decay is None and single is None and masked_output is None:
        return find(convention)
    try:
        return replaced(convention, eps, decay, single, masked_output)
    except TypeError:  # raised for unhashable arguments too: the uncached call raises the proper error
        return replaced.__wrapped__(convention, eps, decay, single, masked_output)


@lru_cache(typed=True)  # True is no eps, though it equals 1.0
def replaced(
    convention: str | Convention,
    eps: float | None,
    decay: float | None,
    single: Single | None,
    masked_output: MaskedOutput | None,
) -> Convention:
    """A convention with other values, cached: building and validating a record takes longer than a small batch norm."""
    overrides: dict[str, Any] = {"eps": eps, "decay": decay, "single": single, "masked_output": masked_output}
    return replace(find(convention), **{name: value for name, value in overrides.items() if value is not None})
