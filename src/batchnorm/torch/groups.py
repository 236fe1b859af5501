"""Ghost batches: statistics of their own for groups of examples."""

import torch
from torch import Tensor
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling

import batchnorm.functional as functional
from batchnorm.convention import Convention
from batchnorm.functional import Activation
from batchnorm.kernels import torch_operators as operators
from batchnorm.torch.arguments import is_single, kept_by_lengths
from batchnorm.torch.graphs import advance_traced, is_exporting, is_traceable
from batchnorm.torch.state import State, is_recomputed, take_in


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
    if is_exporting() or (not is_compiling() and is_tracing()):
        raise NotImplementedError(
            "training in ghost batches (virtual_batch_size) cannot be exported; call model.eval()"
        )
    is_graph = is_compiling() and is_traceable(convention, mask is not None) and not callable(activation)
    groups = len(x) // group_size
    if is_single(x[groups * group_size :], axis):
        groups -= 1
    even = groups * group_size

    def normalized(begin: int, end: int, number: int) -> Tensor:
        """The examples from `begin` to `end`, in so many groups."""

        def grouped(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.ndim < x.ndim or len(tensor) == 1:
                return tensor
            rows = tensor if (begin, end) == (0, len(x)) else tensor[begin:end]  # a slice's gradient is a copy
            return rows.reshape(number, -1, *tensor.shape[1:])

        scale, shift = (parameter if parameter is None else parameter.expand(number, -1) for parameter in (gamma, beta))
        if is_graph:
            y = operators.forward(
                grouped(x), scale, shift, grouped(residual), grouped(mask), [0, axis + 1], convention.eps,
                convention.eps_train, convention.normalize_correction, activation,
            )[0]  # fmt: skip
            return y.flatten(0, 1)  # type: ignore[no-any-return]
        y, _ = functional.batch_norm(
            grouped(x), scale, shift, training=True, convention=convention, axis=(0, axis + 1), mask=grouped(mask),
            activation=activation, residual=grouped(residual),
        )  # fmt: skip
        return y.flatten(0, 1)  # type: ignore[no-any-return]

    if even in (0, len(x)):
        y = normalized(0, len(x), max(groups, 1))
    else:
        y = torch.cat([normalized(0, even, groups), normalized(even, len(x), 1)])
    if is_graph:
        if is_tracked and state is not None:
            advance_traced(state, operators.moments(x, mask, axis), convention, is_masked=mask is not None)
    elif is_tracked and state is not None and not is_recomputed():
        take_in(x, state, convention, axis=axis, mask=mask)
    return y
