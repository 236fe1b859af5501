"""The records of the systems this library speaks for, by name."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from batchnorm.convention import Convention
from batchnorm.conventions import frameworks, seeds

__all__ = ["CONVENTIONS", "find"]

#: Every convention known by name. Each is proven against arrays computed by the system itself (`tests/golden`).
CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {record.name: record for record in (*seeds.RECORDS, *frameworks.RECORDS)}
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
        hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
        raise ValueError(f"no convention is called {convention!r}; {hint}Known are {', '.join(CONVENTIONS)}")
    return CONVENTIONS[convention]
