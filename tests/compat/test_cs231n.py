"""`compat.cs231n` against the original's arrays, and its intended differences."""

import subprocess
import sys
import types

import numpy as np
import pytest
from golden import case_inputs, relative_error, results, tolerance

import batchnorm as bn
from batchnorm.compat.cs231n import batchnorm_backward, batchnorm_forward

DTYPES = ["float64", "float32"]


def rows(array, channel_axis):
    """A case flattened to (N, D), the only form that the original accepts."""
    return np.moveaxis(array, channel_axis, -1).reshape(-1, array.shape[channel_axis])


def case(name, dtype):
    """x of three steps, dy, gamma and beta, and the running statistics of `y_eval_r0`."""
    inputs, axis = case_inputs(name), int(case_inputs(name)["channel_axis"])
    steps = [rows(x, axis).astype(dtype) for x in inputs["x_steps"]]
    vectors = (inputs[key].astype(dtype) for key in ("gamma", "beta", "rmean0", "rvar0"))
    return steps, rows(inputs["dy"], axis).astype(dtype), *vectors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "config", "options"), [
    *((name, "default", {}) for name in ("d2", "d3", "d4", "d5", "seq", "const", "single", "single4", "ill")),
    *((name, "eps1e-3_mom0.5", {"eps": 1e-3, "momentum": 0.5}) for name in ("d2", "d4")),
])  # fmt: skip
def test_original(name, config, options, dtype):
    """Every array of three training steps, the gradients of the first, and test mode."""
    theirs = results("cs231n", dtype, name, config)
    steps, dy, gamma, beta, mean, var = case(name, dtype)
    bn_param, ours = {"mode": "train", **options}, {}
    for number, x in enumerate(steps, start=1):
        y, cache = batchnorm_forward(x, gamma, beta, bn_param)
        if number == 1:
            ours["y"], (ours["dx"], ours["dgamma"], ours["dbeta"]) = y, batchnorm_backward(dy, cache)
        ours[f"running_mean_{number}"] = bn_param["running_mean"]
        ours[f"running_var_{number}"] = bn_param["running_var"]
    for result, stored in (
        ("y_eval_3", bn_param), ("y_eval_init", {}), ("y_eval_r0", {"running_mean": mean, "running_var": var}),
    ):  # fmt: skip
        ours[result], _ = batchnorm_forward(steps[0], gamma, beta, {**stored, **options, "mode": "test"})
    assert set(ours) == set(theirs)
    axis = int(case_inputs(name)["channel_axis"])
    for result, value in ours.items():
        expected = theirs[result] if theirs[result].ndim < 2 else rows(theirs[result], axis)
        assert value.dtype == dtype, result
        # float32 holds this case's mean to 5 % of its deviation only, in the original and in the state
        bound = 0.1 if (name, dtype) == ("ill", "float32") else tolerance("cs231n", dtype, name, result)
        assert relative_error(value, expected) <= bound, result


@pytest.mark.parametrize("dtype", DTYPES)
def test_ill_conditioned_training_is_exact(dtype):
    """The cache stores the rounding error of a float32 mean: out and the gradients equal those of `forward`."""
    (x, *_), dy, gamma, beta, *_ = case("ill", dtype)
    out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train"})
    expected, own = bn.forward(x, gamma, beta, eps=1e-5)
    bound = 1e-12 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(out, expected, rtol=bound, atol=bound)
    for ours, theirs in zip(batchnorm_backward(dy, cache), bn.backward(dy, own)[:3], strict=True):
        assert relative_error(ours, theirs) <= (1e-9 if dtype == "float64" else 1e-6)


def test_one_measurement(monkeypatch):
    """Training reads x once: one call of `batch_norm` returns out, the cache and the running statistics."""
    import batchnorm.compat.cs231n as module

    calls = []
    for name in ("batch_norm", "forward"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=function, _n=name, **o: calls.append(_n) or _f(*a, **o))
    (x, *_), dy, gamma, beta, *_ = case("d2", "float64")
    _, cache = batchnorm_forward(x, gamma, beta, {"mode": "train"})
    batchnorm_backward(dy, cache)
    assert calls == ["batch_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_test_mode(dtype):
    """Against central differences in float64; the original's cache of test mode is None."""
    (x, *_), dy, gamma, beta, mean, var = case("d2", dtype)
    bn_param = {"mode": "test", "eps": 0.1, "running_mean": mean, "running_var": var}
    _, cache = batchnorm_forward(x, gamma, beta, bn_param)
    arguments = [x.astype(float), gamma.astype(float), beta.astype(float)]
    stored = {**bn_param, "running_mean": mean.astype(float), "running_var": var.astype(float)}
    gradients = batchnorm_backward(dy, cache)
    assert [g.dtype for g in gradients] == [dtype] * 3
    for which, gradient in enumerate(gradients):
        assert gradient.shape == arguments[which].shape
        for index in np.ndindex(gradient.shape):
            change = np.zeros_like(arguments[which])
            change[index] = 1e-4
            ends = [
                batchnorm_forward(*(a + sign * change if i == which else a for i, a in enumerate(arguments)), stored)[0]
                for sign in (1, -1)
            ]
            difference = np.sum((ends[0] - ends[1]) * dy) / 2e-4
            np.testing.assert_allclose(gradient[index], difference, rtol=1e-5, atol=1e-5)


def test_dictionary_is_updated_in_place():
    """Both modes store running statistics in `bn_param`, like the original, without writing to the caller's arrays."""
    (x, *_), _, gamma, beta, mean, var = case("d2", "float64")
    for array in (x, gamma, beta, mean, var):
        array.flags.writeable = False
    bn_param = {"mode": "train", "running_mean": mean, "running_var": var, "momentum": 0.75}
    batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(bn_param["running_mean"], 0.75 * mean + 0.25 * x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(bn_param["running_var"], 0.75 * var + 0.25 * x.var(axis=0), rtol=1e-12)
    bn_param = {"mode": "test"}
    batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_array_equal([bn_param["running_mean"], bn_param["running_var"]], np.zeros((2, 5)))


def test_half_precision_keeps_statistics_in_float32():
    (x, *_), dy, gamma, beta, *_ = case("d2", "float16")
    bn_param = {"mode": "train"}
    out, cache = batchnorm_forward(x, gamma, beta, bn_param)
    assert out.dtype == np.float16
    assert bn_param["running_var"].dtype == np.float32
    np.testing.assert_allclose(bn_param["running_var"], 0.1 * x.astype(float).var(axis=0), rtol=1e-6)
    theirs = results("cs231n", "float64", "d2", "default")
    assert relative_error(batchnorm_backward(dy, cache)[0], theirs["dx"]) <= 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_channel_without_eps(dtype):
    """Training gives the limit, xhat = 0, where the original gives 0/0. In test mode both divide by 0."""
    theirs = results("cs231n", dtype, "const", "eps0")
    assert not np.isfinite(theirs["y"]).all()
    (x, *_), dy, gamma, beta, *_ = case("const", dtype)
    out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": 0.0})
    np.testing.assert_array_equal(out[:, 1:], np.broadcast_to(beta[1:], (8, 3)))
    np.testing.assert_array_equal(batchnorm_backward(dy, cache)[0][:, 1:], 0)
    assert relative_error(out[:, 0], theirs["y"][:, 0]) <= tolerance("cs231n", dtype)
    out, cache = batchnorm_forward(x, gamma, beta, {"mode": "test", "eps": 0.0})
    np.testing.assert_array_equal(out[:, :3], np.copysign(np.inf, x * gamma)[:, :3])
    assert np.isnan(out[:, 3]).all()  # x is 0, as the running mean is
    with pytest.warns(RuntimeWarning, match="invalid value"):
        dx, _, dbeta = batchnorm_backward(dy, cache)
    np.testing.assert_array_equal(dx, np.copysign(np.inf, dy * gamma))
    np.testing.assert_allclose(dbeta, dy.sum(axis=0), rtol=1e-6)


def test_batch_that_is_not_finite():
    """Running statistics skip the batch with a warning; its gradients are NaN only in the affected channel."""
    (x, *_), dy, gamma, beta, mean, var = case("d2", "float64")
    x = x.copy()
    x[3, 2] = np.nan
    bn_param = {"mode": "train", "running_mean": mean, "running_var": var}
    with pytest.warns(RuntimeWarning, match="not finite.*did not enter the running statistics") as caught:
        out, cache = batchnorm_forward(x, gamma, beta, bn_param)
    assert [warning.filename for warning in caught] == [__file__]
    np.testing.assert_array_equal(bn_param["running_mean"], mean)
    np.testing.assert_array_equal(bn_param["running_var"], var)
    dx, dgamma, _ = batchnorm_backward(dy, cache)
    theirs = results("cs231n", "float64", "d2", "default")
    for ours, expected in ((out, theirs["y"]), (dx, theirs["dx"]), (dgamma, theirs["dgamma"])):
        assert np.isnan(ours[..., 2]).all()
        np.testing.assert_allclose(np.delete(ours, 2, -1), np.delete(expected, 2, -1), rtol=1e-11, atol=1e-12)


def test_empty_batch_changes_nothing():
    bn_param = {"mode": "train", "running_mean": np.ones(5), "running_var": np.full(5, 2.0)}
    out, cache = batchnorm_forward(np.zeros((0, 5)), np.ones(5), np.zeros(5), bn_param)
    assert out.shape == (0, 5)
    np.testing.assert_array_equal(bn_param["running_mean"], 1)
    np.testing.assert_array_equal(bn_param["running_var"], 2)
    assert [g.shape for g in batchnorm_backward(out, cache)] == [(0, 5), (5,), (5,)]


def test_cache_of_test_mode_is_a_copy():
    """Changing the running statistics in place before the backward pass does not change its gradients."""
    (x, *_), dy, gamma, beta, mean, var = case("d2", "float64")
    bn_param = {"mode": "test", "running_mean": mean.copy(), "running_var": var.copy()}
    _, cache = batchnorm_forward(x, gamma, beta, bn_param)
    expected = batchnorm_backward(dy, cache)
    bn_param["running_mean"] += 100
    bn_param["running_var"] *= 9
    for ours, before in zip(batchnorm_backward(dy, cache), expected, strict=True):
        np.testing.assert_array_equal(ours, before)
    np.testing.assert_allclose(expected[1], (dy * (x - mean) / (np.sqrt(var) + 1e-5)).sum(axis=0), rtol=1e-12)


X, GAMMA, BETA = np.arange(10.0).reshape(2, 5), np.ones(5), np.zeros(5)


def train(**bn_param):
    return X, GAMMA, BETA, {"mode": "train", **bn_param}


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((X, GAMMA, BETA, {}), KeyError, "mode"),
    ((X, GAMMA, BETA, {"mode": "eval"}), ValueError, "'eval'; it must be 'train' or 'test'"),
    ((X.reshape(1, 2, 5), GAMMA, BETA, {"mode": "train"}), ValueError, r"\(1, 2, 5\); it must be \(N, D\)"),
    ((X.tolist(), GAMMA, BETA, {"mode": "train"}), TypeError, "x is a list; it must be a NumPy array"),
    ((X, None, BETA, {"mode": "train"}), TypeError, "gamma is a NoneType"),
    ((X.astype(int), GAMMA, BETA, {"mode": "train"}), TypeError, "x has dtype int64"),
    ((X, GAMMA[:3], BETA, {"mode": "test"}), ValueError, r"gamma has shape \(3,\); it must be \(5,\), as x has"),
    (train(eps=-1.0), ValueError, r"^bn_param\['eps'\] is -1.0; it is added to the variance"),
    (train(eps=None), TypeError, r"^bn_param\['eps'\] is None .*must be a finite number >= 0"),
    (train(eps=True), TypeError, r"^bn_param\['eps'\] is True"),
    (train(momentum=1.5), ValueError, r"^bn_param\['momentum'\] is 1.5; it is the weight of the old value .* 0 to 1$"),
    (train(momentum=None), TypeError, r"^bn_param\['momentum'\] is None \(NoneType\)"),
    (train(momentum="a"), TypeError, r"^bn_param\['momentum'\] is 'a' \(str\)"),
    (train(momentum=np.array(0.5)), TypeError, r"^bn_param\['momentum'\] is array\(0.5\)"),
    (train(running_mean=np.ones(1)), ValueError, r"^bn_param\['running_mean'\] has shape \(1,\); it must be \(5,\)"),
    (train(running_mean=None), TypeError, r"^bn_param\['running_mean'\] is a NoneType"),
    (train(running_var=np.ones(5, int)), TypeError, r"^bn_param\['running_var'\] has dtype int64"),
])  # fmt: skip
def test_refusals_change_nothing(arguments, error, message):
    bn_param = arguments[3]
    before = dict(bn_param)
    with pytest.raises(error, match=message):
        batchnorm_forward(*arguments)
    assert bn_param == before


@pytest.mark.parametrize("bn_param", [None, [("mode", "train")], types.MappingProxyType({"mode": "train"})])
def test_bn_param_must_be_a_dictionary(bn_param):
    with pytest.raises(TypeError, match=r"^bn_param is a .*; it must be a dictionary"):
        batchnorm_forward(X, GAMMA, BETA, bn_param)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_dout_must_fit(mode):
    _, cache = batchnorm_forward(X, GAMMA, BETA, {"mode": mode})
    with pytest.raises(ValueError, match=r"^dout has shape \(5,\); it must be that of x, \(2, 5\)"):
        batchnorm_backward(np.ones(5), cache)
    with pytest.raises(TypeError, match=r"^dout is a list"):
        batchnorm_backward(X.tolist(), cache)
    with pytest.raises(TypeError, match=r"^dout has dtype int64"):
        batchnorm_backward(X.astype(int), cache)


@pytest.mark.parametrize("cache", [None, (1, 2, 3), (1e-5, GAMMA, X, *[X] * 7)])
def test_another_cache_is_refused(cache):
    with pytest.raises(TypeError, match=r"^cache is a (NoneType|tuple); it must be what batchnorm_forward of this"):
        batchnorm_backward(X, cache)


def test_numpy_alone():
    """Importing and using `batchnorm.compat.cs231n` loads no framework."""
    program = (
        "import sys, numpy as np, batchnorm.compat\n"
        "from batchnorm.compat.cs231n import batchnorm_backward, batchnorm_forward\n"
        "_, cache = batchnorm_forward(np.ones((2, 3)), np.ones(3), np.ones(3), {'mode': 'train'})\n"
        "batchnorm_backward(np.ones((2, 3)), cache)\n"
        "print({'torch', 'jax', 'flax', 'optax', 'xarray'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
