"""The running update of a convention in the terms of the C++."""

from functools import lru_cache
from typing import TypedDict, get_args, get_type_hints

import batchnorm._native as _native
from batchnorm.convention import Convention, Tracked

TRACKED, DEBIAS = (get_args(hint) for hint in (Tracked, get_type_hints(Convention)["debias"]))


class Numbers(TypedDict):
    """The fields of `_native.Averaging`."""

    tracked: int
    debias: int
    correction: int
    corrects_tracked: bool
    is_clamped: bool
    needs_two: bool
    is_cumulative: bool
    momentum: float
    eps: float


def numbers_of(convention: Convention, *, masked: bool) -> Numbers:
    """What a batch, with or without a mask, contributes; eps and decay are numbers, not traced."""
    return {
        "tracked": TRACKED.index(convention.tracked),
        "debias": DEBIAS.index(convention.debias),
        "correction": int(convention.correction(masked=masked)),
        "corrects_tracked": convention.correction_on == "tracked",
        "is_clamped": convention.single == "clamp",
        "needs_two": convention.single in ("identity", "running"),
        "is_cumulative": convention.decay is None,
        "momentum": 0.0 if convention.decay is None else float(1 - convention.decay),
        "eps": float(convention.eps),
    }


@lru_cache
def averaging_of(convention: Convention) -> _native.Averaging:
    """What an unmasked batch contributes."""
    return _native.Averaging(**numbers_of(convention, masked=False))
