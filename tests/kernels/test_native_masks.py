"""Values of masked elements, and results that these must not affect, in every instruction set."""

import numpy as np
import pytest
import torch
from layouts import DTYPES, tensor, with_layout
from oracle import activated, as_longdouble, check_gradients, check_within, check_y, expected

import batchnorm as bn

#: Shape, axis, layout and the axes along which the mask varies; `lengths` for leading elements.
CASES = {
    "rows, by batch": ((5, 3, 37), 1, "c", (0,)),
    "rows, by step": ((5, 3, 37), 1, "part2", (0, 2)),
    "rows, by element": ((5, 3, 37), 1, "offset1", (0, 1, 2)),
    "rows, lengths": ((5, 3, 37), 1, "c", "lengths"),
    "columns, by step": ((5, 19, 33), -1, "c", (0, 1)),
    "columns, by channel": ((5, 19, 33), -1, "part2", (2,)),
    "columns, by element": ((5, 19, 33), -1, "c", (0, 1, 2)),
    "columns, lengths": ((5, 19, 33), -1, "c", "lengths"),
    "one channel": ((5, 1, 40), 1, "c", (0, 2)),
    "images, lengths along their height": ((4, 3, 6, 5), 1, "c", "lengths"),
    "images in the memory of channels last": ((4, 3, 6, 5), 1, "last", (0, 2, 3)),
}


def masked_sample(rng, case, dtype):
    shape, axis, layout, along = CASES[case]
    lengths = None
    if along == "lengths":
        batch, time = [a for a in range(len(shape)) if a != axis % len(shape)][:2]
        lengths = np.arange(shape[batch]) * shape[time] // (shape[batch] - 1)
        steps = np.expand_dims(np.arange(shape[time]), [a for a in range(len(shape)) if a != time])
        mask = steps < np.expand_dims(lengths, [a for a in range(len(shape)) if a != batch])
    else:
        mask = rng.random([n if a in along else 1 for a, n in enumerate(shape)]) < 0.6
    x, residual = (rng.normal(size=shape) * 2 + 1 for _ in range(2))
    garbage = rng.choice([np.nan, np.inf, -np.inf, 0.5], size=shape)  # what padding may hold
    x, residual = (with_layout(np.where(mask, a, garbage).astype(DTYPES[dtype]), layout, axis) for a in (x, residual))
    channels = [rng.normal(size=shape[axis]).astype(np.float32) for _ in range(2)]
    return x, residual, *channels, mask, {"lengths": lengths} if lengths is not None else {"mask": mask}, axis


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_normalized_padding(instruction_set, case, dtype, rng):
    """Padding is normalized by the statistics of unmasked elements; NaN and Inf give the y of the mean."""
    x, residual, gamma, beta, mask, counting, axis = masked_sample(rng, case, dtype)
    options = {"axis": axis, "activation": "silu", "residual": residual, "single": "clamp", **counting}
    y, _ = bn.batch_norm(x, gamma, beta, masked_output="normalized", kernel="native", **options)
    exact = expected(x, None, gamma, beta, residual, axis=axis, mask=mask, activation="silu")
    check_y(np.where(mask, y, np.zeros((), y.dtype)), exact, dtype, "silu")
    sizes = [-1 if a == axis % x.ndim else 1 for a in range(x.ndim)]
    mean, rstd, gamma, beta = (a.reshape(sizes) for a in (exact.mean + exact.mean_lo, exact.rstd, gamma, beta))
    padding, added = (
        np.where(np.isfinite(as_longdouble(a)), as_longdouble(a), fill) for a, fill in ((x, mean), (residual, 0))
    )
    z = gamma * (padding - mean) * rstd + beta + added
    unit = np.maximum(1, np.abs(z) + np.abs(beta)) * {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6}.get(
        dtype, 1e-13
    )
    check_within("padding", np.where(mask, 0, as_longdouble(y)), np.where(mask, 0, activated("silu", z)[0]), unit)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradients_at_inference(instruction_set, case, activation, rng):
    """With statistics that do not depend on x, against autograd."""
    x, residual, gamma, beta, mask, counting, axis = masked_sample(rng, case, "float64")
    dy, (mean, var) = rng.normal(size=x.shape), rng.random((2, x.shape[axis])) + 0.5
    leaves = [tensor(a).requires_grad_() for a in (x, gamma, beta, residual)]
    running = bn.RunningStatistics(tensor(mean), tensor(var))
    counting = {name: tensor(value) for name, value in counting.items()}
    options = {"training": False, "axis": axis, "activation": activation, "kernel": "native", **counting}
    y, _ = bn.batch_norm(*leaves[:3], running, residual=leaves[3], **options)
    y.backward(tensor(dy))
    given = {"axis": axis, "mask": mask, "activation": activation, "given": (mean, var)}
    exact = expected(x, dy, gamma, beta, residual, **given)
    check_y(y, exact, "float64", activation)
    check_gradients([leaf.grad for leaf in leaves], exact, "float64")


def test_nothing_counts(instruction_set):
    for shape, axis in (((4, 3, 20), 1), ((4, 20, 3), -1)):
        x = np.full(shape, np.nan, np.float32)
        y, cache = bn.forward(x, np.ones(3, np.float32), axis=axis, mask=np.zeros((4, 1, 1), bool))
        moments = bn.moments(x, axis=axis, mask=np.zeros((4, 1, 1), bool))
        for values in (y, *bn.backward(x, cache)[:2], *moments):
            np.testing.assert_array_equal(values, 0)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_normalized_padding(instruction_set, case, has_residual, activation, rng):
    """Autograd against the generic implementation, also for padding, whose NaN and Inf leave beta and residual in y."""
    x, residual, gamma, beta, _, counting, axis = masked_sample(rng, case, "float64")
    arrays = (x, gamma.astype(float), beta.astype(float), residual if has_residual else None)
    options = {"axis": axis, "activation": activation, "single": "clamp", "masked_output": "normalized"}
    options |= {name: tensor(value) for name, value in counting.items()}
    dy, results = tensor(rng.normal(size=x.shape)), []
    for kernel in ("native", "agnostic"):
        leaves = [None if a is None else tensor(a).requires_grad_() for a in arrays]
        y, _ = bn.batch_norm(*leaves[:3], residual=leaves[3], kernel=kernel, **options)
        assert ("NormalizationBackward" in y.grad_fn.name()) == (kernel == "native")
        y.backward(dy)
        results.append([y, *(leaf.grad for leaf in leaves if leaf is not None)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    assert results[0][1].isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_of_leading_elements_are_lengths(instruction_set, dtype, rng):
    """With channels first, bit for bit; a mask of all elements equals no mask."""
    x, _, gamma, beta, mask, counting, axis = masked_sample(rng, "rows, lengths", dtype)
    by_lengths, by_mask = (
        bn.forward(x, gamma, beta, axis=axis, kernel="native", **options) for options in (counting, {"mask": mask})
    )
    assert by_lengths[0].tobytes() == by_mask[0].tobytes()
    dy = rng.normal(size=x.shape).astype(x.dtype)
    gradients = [bn.backward(dy, cache) for _, cache in (by_lengths, by_mask)]
    assert gradients[0].dx.tobytes() == gradients[1].dx.tobytes()
    x = np.where(np.isfinite(as_longdouble(x)), as_longdouble(x), 0).astype(x.dtype)
    whole, unmasked = bn.forward(x, axis=axis, mask=np.ones((1, 1, 37), bool)), bn.forward(x, axis=axis)
    assert whole[0].tobytes() == unmasked[0].tobytes()
    assert (whole[1].count == unmasked[1].count).all()
