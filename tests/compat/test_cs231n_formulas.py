"""`faithful=True` of `compat.cs231n` reproduces faults of the original that the default corrects."""

import numpy as np
import pytest
from golden import case_inputs, relative_error, results, tolerance

from batchnorm.compat.cs231n import batchnorm_backward, batchnorm_forward


@pytest.mark.parametrize(
    ("case", "config", "eps"), [("d2", "default", 1e-5), ("d2", "eps1e-3_mom0.5", 1e-3), ("single", "default", 1e-5)]
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_faithful_training(case, config, eps, dtype):
    """Where the original has no fault, out and the gradients equal its own."""
    theirs, inputs = results("cs231n", dtype, case, config), case_inputs(case)
    x, dy, gamma, beta = (inputs[name].astype(dtype) for name in ("x", "dy", "gamma", "beta"))
    bn_param = {"mode": "train", "eps": eps}
    out, cache = batchnorm_forward(x, gamma, beta, bn_param, faithful=True)
    for name, ours in zip(("y", "dx", "dgamma", "dbeta"), (out, *batchnorm_backward(dy, cache)), strict=True):
        assert ours.dtype == dtype, name
        assert relative_error(ours, theirs[name]) <= tolerance("cs231n", dtype, case, name), name
    with pytest.raises(ValueError, match="it must be that of x"):
        batchnorm_backward(dy[:1, :1], cache)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_faithful_constant_channel_without_eps(dtype):
    """out and the gradients are the original's, NaN where it has NaN; by default they are finite."""
    theirs, inputs = results("cs231n", dtype, "const", "eps0"), case_inputs("const")
    x, dy, gamma, beta = (inputs[name].astype(dtype) for name in ("x", "dy", "gamma", "beta"))
    states = [{"mode": "train", "eps": 0.0} for _ in range(2)]
    with np.errstate(divide="ignore", invalid="ignore"):
        out, cache = batchnorm_forward(x, gamma, beta, states[0], faithful=True)
        gradients = batchnorm_backward(dy, cache)
    for name, ours in zip(("y", "dx", "dgamma", "dbeta"), (out, *gradients), strict=True):
        assert ours.dtype == dtype
        ours, expected = (np.delete(array, 2, axis=-1) for array in (ours, theirs[name]))  # 2: rounded mean
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected), name)
        finite = np.isfinite(expected)
        assert relative_error(ours[finite], expected[finite]) <= tolerance("cs231n", dtype, "const", name), name
    assert np.isnan(out).any()
    out, _ = batchnorm_forward(x, gamma, beta, states[1])
    assert np.isfinite(out).all()
    np.testing.assert_allclose(states[0]["running_var"], states[1]["running_var"], rtol=1e-6, atol=1e-15)


def test_faithful_mean_is_a_product_with_one_over_n():
    """The original's mean of 49 ones is 1 / 49 * 49 < 1, so that without eps each is one deviation above it."""
    x = np.ones((49, 1))
    assert 1 / 49 * 49 < 1
    out, cache = batchnorm_forward(x, np.ones(1), np.zeros(1), {"mode": "train", "eps": 0.0}, faithful=True)
    np.testing.assert_allclose(out, x, rtol=1e-12)
    np.testing.assert_allclose(cache.rstd, 2.0**53, rtol=1e-12)
    with pytest.raises(ValueError, match=r"x has shape \(0, 1\); the original divides by N = 0"):
        batchnorm_forward(x[:0], np.ones(1), np.zeros(1), {"mode": "train"}, faithful=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_faithful_batch_that_is_not_finite(value):
    """The running statistics of the affected feature stay NaN; by default they skip the batch."""
    x, good = np.array([[1.0, value], [3.0, 2.0]]), np.array([[1.0, 2.0], [3.0, 6.0]])
    faithful, ours = ({"mode": "train"} for _ in range(2))
    with np.errstate(invalid="ignore"):
        batchnorm_forward(x, np.ones(2), np.zeros(2), faithful, faithful=True)
        batchnorm_forward(good, np.ones(2), np.zeros(2), faithful, faithful=True)
    np.testing.assert_allclose(faithful["running_mean"], [0.38, np.nan if np.isnan(value) else np.inf], rtol=1e-12)
    np.testing.assert_allclose(faithful["running_var"], [0.19, np.nan], rtol=1e-12)
    with pytest.warns(RuntimeWarning, match="faithful=True averages it as the original does"):
        batchnorm_forward(x, np.ones(2), np.zeros(2), ours)
    batchnorm_forward(good, np.ones(2), np.zeros(2), ours)
    np.testing.assert_allclose(ours["running_mean"], [0.2, 0.4], rtol=1e-12)
    np.testing.assert_allclose(ours["running_var"], [0.1, 0.4], rtol=1e-12)


def test_faithful_half_precision_does_not_overflow():
    """Sums and squares of float16 end at 65504; the formulas are computed in float32."""
    x = np.full((100, 1), 1000, np.float16)
    x[::2] = 2000
    bn_param = {"mode": "train"}
    out, _ = batchnorm_forward(x, np.ones(1, np.float16), np.zeros(1, np.float16), bn_param, faithful=True)
    assert (out.dtype, bn_param["running_var"].dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(out[:2, 0], [1, -1], rtol=1e-3)
    np.testing.assert_allclose(bn_param["running_mean"], 150, rtol=1e-5)
    np.testing.assert_allclose(bn_param["running_var"], 25000, rtol=1e-5)


def test_faithful_test_mode_has_no_cache():
    """The formula is the default's, and the cache is None, which `batchnorm_backward` rejects."""
    theirs, inputs = results("cs231n", "float64", "d2", "default"), case_inputs("d2")
    stored = {"mode": "test", "running_mean": inputs["rmean0"], "running_var": inputs["rvar0"]}
    out, cache = batchnorm_forward(inputs["x"], inputs["gamma"], inputs["beta"], stored, faithful=True)
    assert relative_error(out, theirs["y_eval_r0"]) <= 1e-12
    assert cache is None
    with pytest.raises(TypeError, match="NoneType"):
        batchnorm_backward(out, cache)
