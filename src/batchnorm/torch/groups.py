"""Ghost batches: statistics of their own for groups of examples."""

import torch
from torch import Tensor

import batchnorm.functional as functional
from batchnorm.convention import Convention
from batchnorm.functional import Activation
from batchnorm.torch.functional import State, is_recomputed, is_single, kept_by_lengths, take_in


def normalize_in_groups(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    state: State | None,
    convention: Convention,
    *,
    group_size: int,
    training: bool,
    is_tracked: bool,
    axis: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    activation: Activation | None,
    residual: Tensor | None,
) -> Tensor:
    """`normalize` in training with statistics of their own for groups of examples, which the state takes in as one.

    The last group may be smaller; one that would have a single element per channel goes to the group before.
    """
    axis %= x.ndim
    if axis == 0:
        raise ValueError("the channels lie along axis 0, where virtual_batch_size groups the examples")
    if lengths is not None:
        mask, lengths = kept_by_lengths(x, lengths, axis), None
    groups = len(x) // group_size
    if is_single(x[groups * group_size :], axis):
        groups -= 1

    def group(tensor: Tensor | None, rows: slice, number: int) -> Tensor | None:
        if tensor is None or tensor.ndim < x.ndim or len(tensor) == 1:
            return tensor
        return tensor[rows].reshape(number, -1, *tensor.shape[1:])

    outputs = []
    for rows, number in ((slice(0, groups * group_size), groups), (slice(groups * group_size, None), 1)):
        part = group(x, rows, number) if number and len(x[rows]) else None
        if part is not None:
            scale, shift = (p if p is None else p.expand(number, -1) for p in (gamma, beta))
            y, _ = functional.batch_norm(
                part, scale, shift, training=True, convention=convention, axis=(0, axis + 1),
                mask=group(mask, rows, number), activation=activation, residual=group(residual, rows, number),
            )  # fmt: skip
            outputs.append(y.flatten(0, 1))
    if is_tracked and state is not None and not is_recomputed():
        take_in(x, state, convention, axis=axis, mask=mask)
    return torch.cat(outputs)
