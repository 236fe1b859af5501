"""The experiment behind `batchnorm train`: one LeNet with batch norm and one without, trained side by side.

A run uses the modules in this order: `options` (the requested run) → `data` (the images) → `network` (the two networks,
in JAX or PyTorch) → `loop` (epochs in lockstep, measured and checkpointed) → `comparison` (conclusions that the numbers
support, by the `intervals` of proportions) → `summary`, `figures` and `report` (pages as pure functions of the
measurements) → `folder` (one run at a time, files complete or absent).
"""
