"""The five public implementations that the library set out from, each in the terms of its own page.

`cs231n`, `d2l`, `lasagne`, `returnn` and `zygote` are imported by name, as in `from batchnorm.compat import cs231n`.
`cs231n` and `lasagne` need NumPy alone, `zygote` needs JAX, `d2l` JAX and Flax, `returnn` xarray. Names, arguments and
defaults are the page's, in Python's spelling; `faithful` is added. Numbers are the page's too, except for its faults:
the module's docstring lists them, the default has none of them, and `faithful=True` reproduces those that are wrong
results rather than errors. docs/origins.md shows each page beside its module.
"""
