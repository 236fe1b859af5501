"""The five public implementations that the library set out from, each in the terms of its own page.

`cs231n`, `d2l`, `lasagne`, `returnn` and `zygote` are imported by name, as in `from batchnorm.compat import cs231n`,
and need only the framework of their page. Names, signatures and numbers are those of the original. Where an original
has a fault, the module's docstring says which one, the default does not have it, and `faithful=True` reproduces it if
its result can be wanted. The page docs/origins.md shows each original beside its module.
"""
