"""Make inputs.npz, which all scripts of this folder read.

    python -m pip install numpy==2.4.6        # Python 3.11; RandomState draws the same numbers in every version
    python make_inputs.py FOLDER

Of case number i, from 0, each batch k of the channel c is drawn with mean -2 + 3 c + k / 2 and deviation
(0.1 + 2 c) (1 + k / 5), by RandomState(101 + i). All numbers are rounded to float32 and stored as float64.
"""

import argparse
import json
from pathlib import Path

import numpy as np

#: Case -> (shape, channel axis).
SHAPES = {
    "d2": ((8, 5), 1),
    "d4": ((6, 4, 5, 3), 1),
    "d3": ((4, 3, 7), 1),
    "d5": ((2, 3, 4, 5, 6), 1),
    "seq": ((5, 7, 4), 2),
    "ill": ((32, 3), 1),
    "const": ((8, 4), 1),
    "single": ((1, 5), 1),
    "single4": ((1, 3, 1, 1), 1),
}
STEPS, FIRST_SEED = 3, 101
LENGTHS = (7, 4, 1, 6, 3)


def draw_batch(random, name, step):
    """One batch of a case."""
    shape, axis = SHAPES[name]
    c = np.arange(shape[axis], dtype=float).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    noise = random.randn(*shape)
    if name == "ill":
        return 1e4 * (-1) ** c + 1e-2 * noise
    x = -2 + 3 * c + step / 2 + (0.1 + 2 * c) * (1 + step / 5) * noise
    if name == "const":
        x[:, 1:] = 2.5, 0.1, 0
    return x


def make():
    """All arrays by key, as float64."""
    arrays = {}
    for seed, (name, (shape, axis)) in enumerate(SHAPES.items(), start=FIRST_SEED):
        random = np.random.RandomState(seed)
        arrays[f"{name}/x_steps"] = np.stack([draw_batch(random, name, step) for step in range(STEPS)])
        arrays[f"{name}/gamma"] = random.uniform(-1.5, 1.5, shape[axis])
        arrays[f"{name}/beta"] = random.uniform(-1, 1, shape[axis])
        arrays[f"{name}/dy"] = random.randn(*shape)
        arrays[f"{name}/channel_axis"] = np.array(axis)
        arrays[f"{name}/x"] = arrays[f"{name}/x_steps"][0]
    random = np.random.RandomState(FIRST_SEED + len(SHAPES))
    for name, (shape, axis) in SHAPES.items():
        arrays[f"{name}/rmean0"] = random.uniform(-2, 2, shape[axis])
        arrays[f"{name}/rvar0"] = random.uniform(0.3, 3, shape[axis])
    rounded = {key: value.astype(np.float32).astype(value.dtype) for key, value in arrays.items()}
    rounded["seq/lengths"] = np.array(LENGTHS)
    rounded["seq/mask"] = np.arange(SHAPES["seq"][0][1]) < rounded["seq/lengths"][:, None]
    return rounded


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make inputs.npz; see the docstring of this script.")
    parser.add_argument("folder", help="existing folder for the file; tests/golden replaces the stored one", type=Path)
    meta = {"system": "inputs", "configs": {}, "errors": {}, "numpy": np.__version__}
    np.savez_compressed(parser.parse_args().folder / "inputs.npz", _meta=np.array(json.dumps(meta)), **make())
