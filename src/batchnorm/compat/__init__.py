"""The five public implementations that this library started from, each with its original interface.

`cs231n`, `d2l`, `lasagne`, `returnn` and `zygote` are imported by name, as in `from batchnorm.compat import cs231n`.
`cs231n` and `lasagne` need only NumPy, `zygote` needs JAX, `d2l` JAX and Flax, `returnn` xarray. Names, arguments and
defaults are those of the original page, in Python's spelling; `faithful` is added. Results are those of the original,
except for its faults: the module's docstring lists them, the default has none of them, and `faithful=True` reproduces
those that are wrong results rather than errors. docs/origins.md shows each page beside its module.
"""
