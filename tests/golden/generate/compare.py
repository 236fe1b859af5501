"""Compare golden arrays that were computed again with the stored ones.

    python compare.py FOLDER [NAME ...]

Prints for each `<FOLDER>/<NAME>.npz` (all files in the folder by default) the keys that are missing or extra, how many
arrays are identical, and the largest difference relative to the largest entry of its array. Exits with 1
if keys, shapes, types, or the positions of NaN and Inf differ.

Needs only NumPy. Other processors and versions change the order of sums, hence the last bits: up to some 1e-15 in
float64 and 1e-6 in float32 is a faithful copy, and so is more in the case `ill`, where rounding is amplified.
"""

import json
import sys
from pathlib import Path

import numpy as np
from archive import DTYPES, GOLDEN


def read(path):
    """The arrays of a file by key, and its `_meta`."""
    with np.load(path) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("_meta")))


def difference(ours, stored):
    """Largest difference over the largest finite entry of `stored`; Inf where the two are of different kinds."""
    if (ours.shape, ours.dtype) != (stored.shape, stored.dtype):
        return np.inf
    ours, stored = ours.astype(np.float64), stored.astype(np.float64)
    finite = np.isfinite(stored)
    if not np.array_equal(ours[~finite], stored[~finite], equal_nan=True) or not np.isfinite(ours[finite]).all():
        return np.inf
    if not finite.any():
        return 0.0
    largest = np.abs(stored[finite]).max()
    error = np.abs(ours[finite] - stored[finite]).max()
    return float(error / largest if largest > 0 else error)


def is_identical(ours, stored):
    """Whether all values are the same; NaN equals NaN."""
    return (ours.shape, ours.dtype) == (stored.shape, stored.dtype) and np.array_equal(ours, stored, equal_nan=True)


def compare(path):
    """Print how one file differs from the stored one; true if both have the same keys and kinds of values."""
    (ours, our_meta), (stored, stored_meta) = read(path), read(Path(GOLDEN, path.name))
    missing, extra = sorted(stored.keys() - ours.keys()), sorted(ours.keys() - stored.keys())
    common = sorted(stored.keys() & ours.keys())
    differences = {key: difference(ours[key], stored[key]) for key in common}
    identical = sum(is_identical(ours[key], stored[key]) for key in common)
    print(f"{path.stem}: {identical} of {len(stored)} identical, {len(missing)} missing, {len(extra)} extra")
    for group in sorted({key.split("/")[0] if key[:3] in DTYPES else "" for key in common}):
        worst = max((key for key in common if key.startswith(group)), key=differences.get)
        if differences[worst] > 0:
            print(f"  largest difference {differences[worst]:.1e} ({worst})")
    changed = [key for key in common if not np.isfinite(differences[key])]
    lists = {"missing": missing, "extra": extra, "of another kind": changed}
    lists["errors"] = sorted(our_meta.get("errors", {}).keys() ^ stored_meta.get("errors", {}).keys())
    for label, keys in lists.items():
        if keys:
            print(f"  {label}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}")
    return not (missing or extra or changed)


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    paths = [folder / f"{name}.npz" for name in names] or sorted(folder.glob("*.npz"))
    are_alike = [compare(path) for path in paths]
    sys.exit(not all(are_alike))
