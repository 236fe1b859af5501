"""Results where a system's own are NaN, infinite or noise; and padding."""

import numpy as np
import pytest
from golden import Replay, case_inputs, relative_error, results, tolerance
from libraries import LIBRARIES, by_name

import batchnorm as bn

DIFFERENTIATING = [LIBRARIES["torch"], LIBRARIES["jax"]]


def limits(system, case, config, dtype, convention, **options):
    """Ours and theirs for a case with a constant channel, gradients by PyTorch."""
    theirs = results(system, dtype, case, config)
    replay = Replay(LIBRARIES["torch"], dtype, case_inputs(case), convention, **options)
    return replay.run(names=set(theirs)), theirs


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("system", "config", "convention"), [
    ("lasagne_theano105_py37", "eps0", "lasagne-gist"),
    ("cs231n", "eps0", "cs231n"),
    ("d2l", "func_eps0", "d2l"),
    ("zygote", "eps0", "zygote-gist"),
    ("flax_linen", "eps0", "flax"),
    ("tensorflow", "fused_eps0", "tensorflow-fused"),
])  # fmt: skip
def test_constant_channel_without_eps_has_its_limit(system, config, convention, dtype):
    """0/0 is NaN, or in float32 rounding noise over itself, in every system; ours is xhat = 0 and no gradient."""
    ours, theirs = limits(system, "const", config, dtype, convention, eps=0.0)
    if not theirs:
        assert (system, dtype) == ("tensorflow", "float64")
        return
    assert not np.isfinite(theirs["y"]).all()
    bound = tolerance(system, dtype)
    assert relative_error(ours["y"][:, 0], theirs["y"][:, 0]) <= bound
    assert relative_error(ours["dx"][:, 0], theirs["dx"][:, 0]) <= bound
    beta = case_inputs("const")["beta"].astype(dtype)
    np.testing.assert_array_equal(ours["y"][:, 1:], np.broadcast_to(beta[1:], (8, 3)))
    np.testing.assert_array_equal(ours["dx"][:, 1:], 0)
    np.testing.assert_array_equal(ours["dgamma"][1:], 0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", ["const", "single"])
def test_lasagne_gradient_of_a_constant_channel(case, dtype):
    """With eps outside the root the derivative of sqrt at 0 makes its dx NaN; the xhat term's limit is 0."""
    ours, theirs = limits("lasagne_theano105_py37", case, "default", dtype, "lasagne-gist")
    inputs = case_inputs(case)
    dy, gamma = inputs["dy"], inputs["gamma"]
    constant = np.isnan(theirs["dx"]).all(axis=0)
    assert constant.sum() == (3 if case == "const" else 5)
    expected = gamma / 0.01 * (dy - dy.mean(axis=0))
    np.testing.assert_allclose(
        ours["dx"][:, constant], expected[:, constant], rtol=1e-5, atol=1e-4 * (dtype != "float64")
    )


def test_cs231n_evaluated_without_deviation_and_eps():
    """A running variance of 0 without eps divides by 0; so does ours."""
    ours, theirs = limits("cs231n", "ill", "eps0", "float64", "cs231n", eps=0.0)
    assert np.isinf(theirs["y_eval_init"]).all()
    np.testing.assert_array_equal(ours["y_eval_init"], theirs["y_eval_init"])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("system", "convention"), [
    ("flax_linen", "flax"), ("keras3_jax", "keras"), ("returnn_rf", "returnn"),
])  # fmt: skip
@pytest.mark.parametrize("library", DIFFERENTIATING, ids=by_name)
def test_nan_in_padding_reaches_nothing(system, convention, dtype, library):
    """The system's y is NaN on padding, and its dx on valid frames too; ours are finite, as with clean padding."""
    theirs, clean = (results(system, dtype, "seq", config) for config in ("mask_padnan", "mask"))
    assert np.isnan(theirs["dx"]).any()
    assert np.isnan(theirs["y"]).any()
    inputs = case_inputs("seq")
    mask = inputs["mask"][:, :, None]
    inputs["x_steps"] = np.where(mask, inputs["x_steps"], np.nan)
    with library.context(dtype):
        replay = Replay(library, dtype, inputs, convention, dy_mask=mask, lengths=inputs["lengths"])
        ours = replay.run(names=set(theirs))
    bound = tolerance(system, dtype, masked=True)
    for name, value in ours.items():
        assert np.isfinite(value).all(), name
        if value.shape == inputs["x"].shape:
            value, expected = value * mask, clean[name] * mask
        else:
            expected = clean[name]
        assert relative_error(value, expected) <= bound, name
    np.testing.assert_array_equal(ours["dx"] * ~mask, 0)
    beta = np.broadcast_to(inputs["beta"].astype(dtype), ours["y"].shape)
    np.testing.assert_array_equal(ours["y"][~inputs["mask"]], beta[~inputs["mask"]])


@pytest.mark.parametrize(("system", "convention"), [
    ("flax_linen", "flax"), ("keras3_jax", "keras"), ("returnn_rf", "returnn"),
])  # fmt: skip
def test_large_padding_changes_no_statistic(system, convention):
    theirs, inputs = results(system, "float64", "seq", "mask_pad1e6"), case_inputs("seq")
    mask = inputs["mask"][:, :, None]
    inputs["x_steps"] = np.where(mask, inputs["x_steps"], 1e6)
    replay = Replay(LIBRARIES["torch"], "float64", inputs, convention, dy_mask=mask, lengths=inputs["lengths"])
    ours = replay.run(names=set(theirs))
    assert {"y", "dx", "running_mean_3", "running_var_3"} <= ours.keys()
    for name, value in ours.items():
        assert relative_error(value, theirs[name]) <= (2e-5 if system == "keras3_jax" else 2e-6), name


def test_returnn_with_gradients_on_padding():
    """Normalized padding is output like any other: its dy enters dgamma, dbeta and the gradient of the statistics."""
    theirs, inputs = results("returnn_rf", "float64", "seq", "mask"), case_inputs("seq")
    replay = Replay(LIBRARIES["torch"], "float64", inputs, "returnn", lengths=inputs["lengths"])
    ours = replay.run(names={"y", "dx", "dgamma", "dbeta"})
    for name, value in ours.items():
        assert relative_error(value, theirs[f"{name}_fulldy"]) <= 2e-6, name


def test_returnn_without_tracking_uses_the_batch_always():
    theirs, inputs = results("returnn_rf", "float64", "seq", "mask_notrack"), case_inputs("seq")
    y, _ = bn.batch_norm(inputs["x"], inputs["gamma"], inputs["beta"], lengths=inputs["lengths"], convention="returnn")
    assert relative_error(y, theirs["y"]) <= 2e-6
    assert relative_error(y, theirs["y_eval_3"]) <= 2e-6


@pytest.mark.parametrize(("config", "frames", "lengths"), [
    ("mask_onevalid", 1, [1, 0, 0, 0, 0]), ("mask_alllen0", 0, [0, 0, 0, 0, 0]),
])  # fmt: skip
def test_returnn_with_hardly_a_frame(config, frames, lengths):
    """One valid frame is its own mean, with variance 0; without valid frames the state is unchanged."""
    theirs, inputs = results("returnn_rf", "float64", "seq", config), case_inputs("seq")
    running = None
    for step, x in enumerate(inputs["x_steps"][:, :, :frames], start=1):
        y, running = bn.batch_norm(
            x, inputs["gamma"], inputs["beta"], running, lengths=np.array(lengths), convention="returnn"
        )
        if step == 1:
            assert y.shape == theirs["y"].shape
            assert relative_error(y, theirs["y"]) <= 2e-6
        assert relative_error(running.mean, theirs[f"running_mean_{step}"]) <= 2e-6
        assert relative_error(running.spread, theirs[f"running_var_{step}"]) <= 2e-6
    assert running.steps == (3 if frames else 0)
