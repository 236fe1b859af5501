"""Two originals with special replays: statistics as gradients, and rows in place of channels."""

import numpy as np
import pytest
from golden import Replay, case_inputs, relative_error, results, tolerance
from libraries import LIBRARIES, by_name

import batchnorm as bn

DIFFERENTIATING = [LIBRARIES["torch"], LIBRARIES["jax"]]


@pytest.mark.parametrize("library", DIFFERENTIATING, ids=by_name)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("case", "config", "options"), [
    *((case, "default", {}) for case in ("d2", "d3", "d4", "d5", "seq", "const")),
    *((case, name, {"activation": name}) for case in ("d2", "d4") for name in ("relu", "tanh")),
    *((case, "eps1e-2", {"eps": float(np.float32(1e-2))}) for case in ("d2", "d4")),
])  # fmt: skip
def test_zygote(library, dtype, case, config, options):
    """Its gradients are the statistics of one batch, which is a running update with decay 0."""
    theirs, inputs = results("zygote", dtype, case, config), case_inputs(case)
    bound = tolerance("zygote", dtype, case)
    with library.context(dtype):
        axis = {"axis": int(inputs["channel_axis"])}
        replay = Replay(library, dtype, inputs, "zygote-gist", decay=0.0, **options, **axis)
        ours = replay.run(names={"y", "dx", "dgamma", "dbeta", "y_eval_init", "y_eval_r0"})
        for name, value in ours.items():
            assert relative_error(value, theirs[name]) <= bound, name
        for step, x in enumerate(replay.x_steps, start=1):
            y, batch = bn.batch_norm(
                x, running=replay.initial(), convention="zygote-gist", decay=0.0, **options, **axis
            )
            if f"mu_dropped_{step}" in theirs:
                assert relative_error(library.numpy(batch.mean), theirs[f"mu_dropped_{step}"]) <= bound
                assert relative_error(library.numpy(batch.spread), theirs[f"sigma_dropped_{step}"]) <= bound
        _, stored = replay.call(running=replay.initial(), training=True)
        y, _ = replay.call(running=stored, training=False)
        assert relative_error(library.numpy(y), theirs["y_eval_stored"]) <= bound


def test_zygote_ill_conditioned():
    theirs, inputs = results("zygote", "float64", "ill", "default"), case_inputs("ill")
    y, batch = bn.batch_norm(inputs["x"], inputs["gamma"], inputs["beta"], convention="zygote-gist", decay=0.0)
    assert relative_error(y, theirs["y"]) <= 1e-9
    assert relative_error(batch.spread, theirs["sigma_dropped_1"]) <= 1e-9


def test_zygote_averages_what_it_returns():
    """With the decay that its unused field means, three steps average its three batch statistics."""
    theirs, inputs = results("zygote", "float64", "d3", "default"), case_inputs("d3")
    running, mean, spread = None, 0.0, 1.0
    for step, x in enumerate(inputs["x_steps"], start=1):
        _, running = bn.batch_norm(x, running=running, convention="zygote-gist")
        mean = 0.9 * mean + 0.1 * theirs[f"mu_dropped_{step}"]
        spread = 0.9 * spread + 0.1 * theirs[f"sigma_dropped_{step}"]
    assert relative_error(running.mean, mean) <= 1e-12
    assert relative_error(running.spread, spread) <= 1e-12


def test_zygote_single_element_is_finite():
    """Its m / (m - 1) is infinite for one element; ours is clamped to 1, so that sigma is sqrt(eps)."""
    theirs, inputs = results("zygote", "float64", "single", "default"), case_inputs("single")
    assert np.isinf(theirs["sigma_dropped_1"]).all()
    y, batch = bn.batch_norm(inputs["x"], inputs["gamma"], inputs["beta"], convention="zygote-gist", decay=0.0)
    assert relative_error(y, theirs["y"]) <= 1e-12
    np.testing.assert_allclose(batch.spread, float(np.float32(1e-5)) ** 0.5, rtol=1e-12)


@pytest.mark.parametrize("library", DIFFERENTIATING, ids=by_name)
@pytest.mark.parametrize("config", ["module_asis_nf3", "module_nhwc_nf4"])
def test_d2l_on_images_normalizes_rows(library, config):
    """What its code does with channels-last images: statistics of axis 1, gamma and beta on the last axis."""
    theirs = results("d2l", "float64", "d4", config)
    with library.context("float64"):
        x, dy, gamma, beta = (library.array(theirs[n]) for n in ("x_steps", "dy", "gamma", "beta"))
        running = bn.RunningStatistics.initial(theirs["x_steps"].shape[2], "d2l", like=x)

        def layer(x, gamma, beta, running, training):
            xhat, running = bn.batch_norm(x, running=running, convention="d2l", axis=1, training=training)
            return xhat * gamma + beta, running

        def loss(running, training):
            return lambda x, gamma, beta: (layer(x, gamma, beta, running, training)[0] * dy).sum()

        ours = {"y_eval_init": layer(x[0], gamma, beta, running, False)[0]}
        gradients = library.gradients(loss(running, True), x[0], gamma, beta)
        ours |= dict(zip(("dx", "dgamma", "dbeta"), gradients, strict=True))
        for step in range(3):
            y, running = layer(x[step], gamma, beta, running, True)
            ours.setdefault("y", y)
            for name, value in (("mean", running.mean), ("var", running.spread)):
                # the state silently takes the shape (1, rows, 1, C), with the same numbers for each channel
                ours[f"running_{name}_{step + 1}"] = value[None, :, None, None] + 0 * gamma
        ours["y_eval_3"] = layer(x[0], gamma, beta, running, False)[0]
        gradients = library.gradients(loss(running, False), x[0], gamma, beta)
        ours |= dict(zip(("dx_eval_3", "dgamma_eval_3", "dbeta_eval_3"), gradients, strict=True))
        compared = {name: library.numpy(value) for name, value in ours.items()}
    for name, value in compared.items():
        assert relative_error(value, theirs[name]) <= 1e-12, name
    assert relative_error(compared["running_mean_1"], theirs["moving_mean_after_init"]) <= 1e-12
