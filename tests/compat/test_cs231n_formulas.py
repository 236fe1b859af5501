"""`faithful=True` of `compat.cs231n`: the faults of the original, which the default does not have."""

import numpy as np
import pytest
from golden import case_inputs, relative_error, results, tolerance

from batchnorm.compat.cs231n import batchnorm_backward, batchnorm_forward


@pytest.mark.parametrize(
    ("case", "config", "eps"), [("d2", "default", 1e-5), ("d2", "eps1e-3_mom0.5", 1e-3), ("single", "default", 1e-5)]
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_faithful_training(case, config, eps, dtype):
    """Where no fault shows, out and the gradients are the original's as well."""
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
        ours, expected = (np.delete(array, 2, axis=-1) for array in (ours, theirs[name]))  # whose mean is rounded
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected), name)
        finite = np.isfinite(expected)
        assert relative_error(ours[finite], expected[finite]) <= tolerance("cs231n", dtype, "const", name), name
    assert np.isnan(out).any()
    out, _ = batchnorm_forward(x, gamma, beta, states[1])
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(states[0]["running_var"], states[1]["running_var"])


def test_faithful_test_mode_has_no_cache():
    """The formula is the default's, and the cache is None, which `batchnorm_backward` cannot take."""
    theirs, inputs = results("cs231n", "float64", "d2", "default"), case_inputs("d2")
    stored = {"mode": "test", "running_mean": inputs["rmean0"], "running_var": inputs["rvar0"]}
    out, cache = batchnorm_forward(inputs["x"], inputs["gamma"], inputs["beta"], stored, faithful=True)
    assert relative_error(out, theirs["y_eval_r0"]) <= 1e-12
    assert cache is None
    with pytest.raises(TypeError, match="NoneType"):
        batchnorm_backward(out, cache)
