"""Inputs, names and files of the golden arrays, for the scripts of this folder.

tests/golden/README.md defines the cases, the keys `<f64|f32>/<case>/<config>/<name>` and the names of results.

Written for Python 2.7 and NumPy 1.11 too, because run_lasagne.py needs them for Theano 0.8.2.
"""
# ruff: noqa: RUF005, UP004, UP031

import argparse
import contextlib
import json
import os
import platform
from collections import OrderedDict

import numpy as np

GOLDEN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CASES = ("d2", "d4", "d3", "d5", "seq", "ill", "const", "single", "single4")
DTYPES = OrderedDict([("f64", np.float64), ("f32", np.float32)])
MESSAGE_LENGTH = 300  # Theano's messages contain whole graphs
STATISTICS = ("rmean0", "rvar0")


class Case(object):
    """The inputs of one case, converted to `dtype`; every value is exact in float32.

    Attributes: `x_steps` (three batches), `x` (the first), `dy` of the shape of x, and `gamma`, `beta`, `rmean0`,
    `rvar0` of shape (C,); `channel_axis`; `lengths` and `mask`, which are None except in the case `seq`.
    """

    def __init__(self, name, dtype="f64"):
        arrays = read_case(name)
        self.name, self.dtype = name, DTYPES[dtype]
        self.channel_axis = self.moved_to = int(arrays["channel_axis"])
        self.lengths, self.mask = arrays.get("lengths"), arrays.get("mask")
        for key in ("x_steps", "dy", "gamma", "beta") + STATISTICS:
            setattr(self, key, arrays[key].astype(self.dtype))

    @property
    def x(self):
        """The first batch."""
        return self.x_steps[0]

    def move_channels(self, axis):
        """Move the channel axis of `x_steps` and `dy` to `axis`; `restore` moves that of a result back."""
        moved = [np.ascontiguousarray(np.moveaxis(x, self.channel_axis, axis)) for x in self.x_steps]
        self.x_steps, self.moved_to = np.stack(moved), axis
        self.dy = np.ascontiguousarray(np.moveaxis(self.dy, self.channel_axis, axis))

    def restore(self, value):
        """The result in the layout of inputs.npz: arrays of the shape of x are moved, statistics stay."""
        value = np.asarray(value)
        return np.moveaxis(value, self.moved_to, self.channel_axis) if value.shape == self.dy.shape else value

    def pad(self, value):
        """Set the padding frames of `x_steps` to `value`, unless it is None, and those of `dy` to 0."""
        padding = ~self.mask
        self.dy[padding] = 0
        if value is not None:
            self.x_steps[:, padding] = value


def read_case(name):
    """The arrays of inputs.npz whose keys begin with `name/`, by the rest of the key."""
    with np.load(os.path.join(GOLDEN, "inputs.npz")) as file:
        return {key[len(name) + 1 :]: file[key] for key in file.files if key.startswith(name + "/")}


class Archive(object):
    """The results of one system by key, and what `_meta` says about them."""

    def __init__(self, system, **notes):
        self.arrays, self.meta = OrderedDict(), OrderedDict(system=system)
        self.meta.update(notes, configs={}, errors={}, python=platform.python_version(), numpy=np.__version__)

    def add(self, dtype, case, config, results):
        """Store `results`, arrays by name, as `<dtype>/<case>/<config>/<name>`; `config` may be empty."""
        for name, value in results.items():
            self.arrays["/".join(part for part in (dtype, case, config, name) if part)] = np.asarray(value)

    def add_config(self, case, config, options):
        """Record the arguments of one configuration in `_meta`."""
        self.meta["configs"][case + "/" + config] = options

    @contextlib.contextmanager
    def record_error(self, label):
        """Record the exception that the system raises in this block; what the block stored before it stays."""
        try:
            yield
        except Exception as error:
            message = "%s: %s" % (type(error).__name__, str(error)[:MESSAGE_LENGTH])
            self.meta["errors"][label] = message

    def write(self, folder, name):
        """Write `<folder>/<name>.npz`, which loads without pickle."""
        path = os.path.join(folder, name + ".npz")
        meta = json.dumps(self.meta).encode("ascii").decode("ascii")  # unicode in Python 2 too
        np.savez_compressed(path, _meta=np.array(meta), **self.arrays)
        print("%s: %d arrays, %d errors of the system" % (path, len(self.arrays), len(self.meta["errors"])))


def run(name, make, *files):
    """Command line of a script: write what `make(*paths of files)` returns as `<name>.npz` to the given folder."""
    parser = argparse.ArgumentParser(description="Compute %s.npz; see the docstring of this script." % name)
    parser.add_argument("folder", help="existing folder for the result; tests/golden replaces the stored file")
    for file in files:
        parser.add_argument(file)
    arguments = vars(parser.parse_args())
    make(*[arguments[file] for file in files]).write(arguments["folder"], name)
