"""The experiment behind `batchnorm train`: one LeNet with batch norm and one without, trained side by side.

A run goes through the files in this order: `options` (what was asked) → `data` (the images) → `network` (the two
networks, in JAX or PyTorch) → `loop` (epochs in lockstep, measured and checkpointed) → `comparison` (what the numbers
allow to conclude, by the `intervals` of shares) → `summary`, `figures` and `report` (pages as pure functions of what
was measured) → `folder` (one run at a time, files that appear whole or not at all).
"""
