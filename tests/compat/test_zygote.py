"""`compat.zygote` against the original's arrays, its intended differences, and its use in a training loop."""

import subprocess
import sys
from functools import partial
from threading import Barrier, Thread

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import case_inputs, relative_error, results, tolerance

import batchnorm.jax as bnj
from batchnorm.compat import zygote

EPS = float(np.float32(1e-5))


def given(case, dtype, activation=None, **options):
    """The layer of a case in the original's initial state, x of three steps, dy and another state."""
    inputs = {name: jnp.asarray(value, dtype) for name, value in case_inputs(case).items() if value.dtype == float}
    axis = int(case_inputs(case)["channel_axis"])
    x_steps, dy = jnp.moveaxis(inputs["x_steps"], 1 + axis % inputs["dy"].ndim, 2), jnp.moveaxis(inputs["dy"], axis, 1)
    layer = zygote.BatchNorm(x_steps.shape[2], activation, **options)
    wide = {name: jnp.asarray(getattr(layer, name), dtype) for name in ("mu", "sigma")}
    layer = layer.replace(beta=inputs["beta"], gamma=inputs["gamma"], **wide)
    return layer, x_steps, dy, (inputs["rmean0"], inputs["rvar0"]), axis


def differentiated(layer, x, dy):
    """y of training, and the gradients of layer and x."""

    def loss(layer, x):
        y = layer(x)
        return jnp.sum(y * dy), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, *gradients


@partial(jax.jit, static_argnums=3)
def replay(layer, x_steps, dy, axis, stored):
    """Every array of the original, in the layout of the inputs."""
    y, gradient, dx = differentiated(layer, x_steps[0], dy)
    ours = {"y": y, "dx": dx, "dgamma": gradient.gamma, "dbeta": gradient.beta}
    for step, x in enumerate(x_steps, start=1):
        _, gradient, _ = differentiated(layer, x, dy)
        ours |= {f"mu_dropped_{step}": gradient.mu, f"sigma_dropped_{step}": gradient.sigma}
        if step == 1:
            ours["y_eval_stored"] = layer.replace(mu=gradient.mu, sigma=gradient.sigma)(x)
    plain = layer.replace(beta=jnp.zeros_like(layer.beta), gamma=jnp.ones_like(layer.gamma), activation=None)
    ours["xhat"], _, ours["dx_of_xhat"] = differentiated(plain, x_steps[0], dy)
    ours["y_eval_init"] = layer(x_steps[0])
    ours["y_eval_r0"] = layer.replace(mu=stored[0], sigma=stored[1])(x_steps[0])
    return {name: jnp.moveaxis(value, 1, axis) if value.ndim > 1 else value for name, value in ours.items()}


@pytest.mark.parametrize(("case", "config", "dtype", "options"), [
    *((case, "default", "float64", {}) for case in ("d2", "d3", "d4", "d5", "seq", "const", "ill")),
    *((case, "default", "float32", {}) for case in ("d2", "d4", "const")),
    ("d4", "relu", "float64", {"activation": "relu"}), ("d2", "tanh", "float64", {"activation": jnp.tanh}),
    ("d4", "eps1e-2", "float64", {"eps": 1e-2}),
    ("single", "default", "float64", {"faithful": True}), ("single4", "default", "float32", {"faithful": True}),
])  # fmt: skip
def test_original(case, config, dtype, options):
    """The results of plain and differentiated calls, and the statistics as gradients, Inf included."""
    theirs = results("zygote", dtype, case, config)
    with jax.enable_x64(dtype == "float64"):
        layer, x_steps, dy, stored, axis = given(case, dtype, **options)
        ours = replay(layer, x_steps, dy, axis, stored)
    assert {"y", "dx", "dgamma", "mu_dropped_1", "sigma_dropped_1", "y_eval_r0"} <= set(theirs) <= set(ours)
    for name, expected in theirs.items():
        assert ours[name].dtype == dtype, name
        np.testing.assert_array_equal(np.isinf(ours[name]), np.isinf(expected), err_msg=name)
        assert relative_error(ours[name], expected) <= tolerance("zygote", dtype, case, name), name
    assert np.isinf(theirs["sigma_dropped_1"]).all() == case.startswith("single")


@pytest.mark.parametrize("case", ["single", "single4"])
def test_one_element_per_channel(case):
    """The original's gradient of sigma is infinite; by default it is sqrt(eps)."""
    theirs = results("zygote", "float64", case, "default")
    assert np.isinf(theirs["sigma_dropped_1"]).all()
    with jax.enable_x64(True):
        layer, x_steps, dy, *_ = given(case, "float64")
        y, gradient, _ = differentiated(layer, x_steps[0], dy)
        assert relative_error(y, theirs["y"]) <= 1e-12
        assert relative_error(gradient.mu, theirs["mu_dropped_1"]) <= 1e-12
        np.testing.assert_allclose(gradient.sigma, EPS**0.5, rtol=1e-12)
        two = jnp.concatenate([x_steps[0], x_steps[1]])  # no fault: faithful changes nothing
        for faithful in (False, True):
            one = layer.replace(faithful=faithful)
            gradient = jax.grad(lambda one: one(two).sum())(one)
            expected = np.sqrt(np.var(two, axis=(0, *range(2, two.ndim))) + EPS) * 2
            np.testing.assert_allclose(gradient.sigma, expected, rtol=1e-12)


X = jnp.asarray(np.random.default_rng(29).normal(2, 3, (6, 3, 4)), jnp.float32)
DY = jnp.asarray(np.random.default_rng(30).normal(size=X.shape), jnp.float32)
LAYER = zygote.BatchNorm(3, "sigmoid").replace(
    beta=jnp.asarray([0.1, -0.2, 0.3]), gamma=jnp.asarray([1.5, 0.5, -1.0]), mu=jnp.asarray([1.0, 2.0, 3.0]),
    sigma=jnp.asarray([2.0, 1.0, 4.0]),
)  # fmt: skip


def inference(beta, gamma, x):
    mu, sigma = (value[:, None] for value in (LAYER.mu, LAYER.sigma))
    return jax.nn.sigmoid(gamma[:, None] * (x - mu) / sigma + beta[:, None])


def test_testmode_has_the_derivatives_of_inference():
    """In reverse and forward mode; without `testmode` all derivatives are those of training."""
    frozen = zygote.testmode(LAYER)
    y, gradient, dx = differentiated(frozen, X, DY)
    expected = jax.grad(lambda *a: jnp.sum(inference(*a) * DY), argnums=(0, 1, 2))(LAYER.beta, LAYER.gamma, X)
    for ours, theirs in zip((gradient.beta, gradient.gamma, dx), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal([gradient.mu, gradient.sigma], np.zeros((2, 3)))
    for value in (y, frozen(X), LAYER(X)):
        np.testing.assert_allclose(value, inference(LAYER.beta, LAYER.gamma, X), rtol=1e-5, atol=1e-6)
    _, change = jax.jvp(frozen, (X,), (DY,))
    _, theirs = jax.jvp(partial(inference, LAYER.beta, LAYER.gamma), (X,), (DY,))
    np.testing.assert_allclose(change, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(differentiated(LAYER, X, DY)[2] - dx).max() > 0.01


def test_testmode_of_a_faithful_single_element():
    """Frozen, sigma has no gradient to be infinite, and forward mode works."""
    layer = zygote.testmode(zygote.BatchNorm(3, faithful=True))
    _, change = jax.jvp(lambda layer: layer(X[:1, :, 0]), (layer,), (jax.tree.map(jnp.ones_like, layer),))
    np.testing.assert_allclose(change, X[:1, :, 0] + 1, rtol=1e-6)
    gradient = jax.grad(lambda layer: layer(X[:1, :, 0]).sum())(layer)
    np.testing.assert_array_equal([gradient.mu, gradient.sigma], np.zeros((2, 3)))
    np.testing.assert_allclose(gradient.gamma, X[0, :, 0], rtol=1e-6)


def test_testmode_of_a_model_is_a_copy():
    """It changes every layer of a copy of the pytree, so that threads cannot affect each other."""
    model = {"layers": [LAYER, (LAYER.replace(faithful=True), X)]}
    frozen = zygote.testmode(model)
    assert [layer.frozen for layer in (frozen["layers"][0], frozen["layers"][1][0])] == [True, True]
    assert not LAYER.frozen
    assert frozen["layers"][1][1] is X
    training, testing = (differentiated(layer, X, DY)[2] for layer in (LAYER, zygote.testmode(LAYER)))
    start, found = Barrier(2), {}

    def work(name, layer):
        start.wait()
        found[name] = [differentiated(layer, X, DY)[2] for _ in range(20)]

    threads = [Thread(target=work, args=item) for item in (("train", LAYER), ("test", zygote.testmode(LAYER)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, expected in (("train", training), ("test", testing)):
        for dx in found[name]:
            np.testing.assert_array_equal(dx, expected)


def test_pytree():
    """Three children by attribute; the options are static, so that `jit` compiles again where they change."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(LAYER)]
    assert paths[:2] == [".beta", ".gamma"]
    assert all(path.startswith(".running") for path in paths[2:])
    doubled = jax.tree.map(lambda value: 2 * value, LAYER)
    np.testing.assert_array_equal(doubled.sigma, [4, 2, 8])
    assert (doubled.activation, doubled.eps, doubled.frozen) == ("sigmoid", EPS, False)
    call = jax.jit(lambda layer, x: jax.grad(lambda x: jnp.sum(layer(x) * DY))(x))
    for layer in (LAYER, zygote.testmode(LAYER)):
        np.testing.assert_allclose(call(layer, X), differentiated(layer, X, DY)[2], rtol=1e-4, atol=1e-5)


def test_trains_with_the_averaging_optimizer():
    """mu and sigma average the batches with decay 0.9; the other parameters take a step of gradient descent."""
    optimizer, layer = bnj.partition(optax.sgd(0.1), decay=0.9), zygote.BatchNorm(3)
    state, mu, sigma = optimizer.init(layer), np.zeros(3), np.ones(3)

    @jax.jit
    def step(layer, state, x):
        gradient = jax.grad(lambda layer: jnp.sum(layer(x) * DY))(layer)
        updates, state = optimizer.update(gradient, state, layer)
        return optax.apply_updates(layer, updates), state

    for number in range(3):
        x = X * (1 + number) - number
        layer, state = step(layer, state, x)
        count = x.size // 3
        mu = 0.9 * mu + 0.1 * np.mean(x, axis=(0, 2))
        sigma = 0.9 * sigma + 0.1 * np.sqrt(np.var(x, axis=(0, 2)) + EPS) * count / (count - 1)
    assert isinstance(layer, zygote.BatchNorm)
    np.testing.assert_allclose(layer.mu, mu, rtol=1e-5)
    np.testing.assert_allclose(layer.sigma, sigma, rtol=1e-5)
    np.testing.assert_allclose(layer.beta, -0.3 * np.sum(DY, axis=(0, 2)), rtol=1e-4)


def test_another_optimizer_on_the_statistics_is_refused():
    gradient = jax.grad(lambda layer: layer(X).sum())(LAYER)
    moved = jax.tree.map(lambda value, change: value - 0.1 * change, LAYER, gradient)
    with pytest.raises(ValueError, match="another optimizer than running_average"):
        moved(X)


def test_statistics_do_not_depend_on_the_loss():
    """They add up over calls, and are those of the batch even if the loss does not depend on y."""
    gradient = jax.grad(lambda layer: -3.0 * layer(X).sum() + 0.0 * layer(2 * X).sum())(LAYER)
    np.testing.assert_allclose(gradient.mu, 3 * np.mean(X, axis=(0, 2)), rtol=1e-5)
    assert float(gradient.running.steps) == 2


def test_replace_and_eps():
    layer = zygote.BatchNorm(3, eps=0.1)
    assert layer.eps == float(np.float32(0.1))
    assert layer.replace(frozen=True).frozen
    np.testing.assert_array_equal(layer.replace(mu=jnp.ones(3)).running.mean, np.ones(3))
    with jax.enable_x64(True):
        wide = zygote.BatchNorm(3)
        assert [value.dtype for value in (wide.beta, wide.gamma, wide.mu, wide.sigma)] == [jnp.float32] * 4
    with pytest.raises(
        TypeError, match="has no epsilon; it has mu, sigma, beta, gamma, running, activation, eps, momentum"
    ):
        layer.replace(epsilon=0.1)


def test_arguments_of_the_page():
    """The initial values are functions of the number of channels; momentum is kept for the optimizer, and unused."""
    initial = {"init_beta": lambda n: jnp.arange(float(n)), "init_gamma": lambda n: np.full(n, 2.0)}
    layer = zygote.BatchNorm(3, **initial, momentum=0.5)
    assert (layer.momentum, zygote.BatchNorm(3).momentum) == (0.5, 0.1)
    x = X[:, :, 0]
    np.testing.assert_allclose(layer(x), 2 * x + np.arange(3), rtol=1e-6)
    optimizer = bnj.partition(optax.sgd(0.0), decay=1 - layer.momentum)
    gradient = jax.grad(lambda layer: layer(x).sum())(layer)
    updates, _ = optimizer.update(gradient, optimizer.init(layer), layer)
    np.testing.assert_allclose(optax.apply_updates(layer, updates).mu, 0.5 * np.mean(x, axis=0), rtol=1e-5)


def test_repr():
    assert repr(LAYER) == "BatchNorm(3, activation='sigmoid', eps=1e-05, frozen=False)"
    assert repr(zygote.testmode(zygote.BatchNorm(2))) == "BatchNorm(2, activation=None, eps=1e-05, frozen=True)"
    assert repr(jax.tree.map(lambda leaf: None, LAYER)).startswith("BatchNorm(")


@pytest.mark.parametrize(("arguments", "options", "error", "message"), [
    ((-1,), {}, ValueError, "^channels is -1; it must be 1 or more"),
    ((0,), {}, ValueError, "^channels is 0"),
    ((2.5,), {}, TypeError, "^channels is 2.5; it must be an integer, the size of axis 1"),
    (((2,),), {}, TypeError, r"^channels is \(2,\)"),
    ((3, "elu"), {}, ValueError, "no activation is called 'elu'"),
    ((3, 3), {}, TypeError, "^activation is 3; it must be a name, a callable"),
    ((3,), {"eps": -1.0}, ValueError, r"^eps is -1\.0"),
    ((3,), {"eps": None}, TypeError, "^eps is None"),
    ((3,), {"momentum": 2}, ValueError, "^momentum is 2; it is the weight of the batch"),
    ((3,), {"init_beta": 0.0}, TypeError, "^init_beta is 0.0; it must be a function of the number of channels"),
    ((3,), {"init_gamma": lambda n: jnp.ones((n, 1))}, ValueError, r"^init_gamma\(3\) has shape \(3, 1\)"),
    ((3,), {"init_gamma": jnp.arange}, TypeError, r"^init_gamma\(3\) has dtype int32"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        zygote.BatchNorm(*arguments, **options)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize(("x", "fields", "error", "message"), [
    (jnp.ones(3), {}, ValueError, r"^x has shape \(3,\); it must be \(N, C\)"),
    (jnp.ones(()), {}, ValueError, r"^x has shape \(\)"),
    (jnp.ones((4, 2)), {}, ValueError, r"^beta has shape \(3,\); it must be \(2,\), as x has shape \(4, 2\)"),
    (jnp.ones((4, 3), int), {}, TypeError, "^x has dtype int32"),
    ([[1.0] * 3], {}, TypeError, "^x is a list"),
    (jnp.ones((4, 3)), {"mu": jnp.ones(7)}, ValueError, r"^mu has shape \(7,\); it must be \(3,\)"),
    (jnp.ones((4, 3)), {"sigma": jnp.ones(1)}, ValueError, r"^sigma has shape \(1,\)"),
])  # fmt: skip
def test_calls_that_do_not_fit(x, fields, error, message, faithful):
    with pytest.raises(error, match=message):
        zygote.BatchNorm(3, faithful=faithful).replace(**fields)(x)


def test_only_what_is_differentiated_trains():
    """Zygote trains every layer in a differentiated function; in JAX only layers reached by derivatives train."""
    head, x = jnp.asarray(2.0), X[:, :, 0]

    def loss(head, layer, x):
        return jnp.sum((head * layer(x)) ** 2)

    training = jax.vjp(LAYER, x)[0]
    for faithful in (False, True):
        layer = LAYER.replace(faithful=faithful)
        evaluated, trained = (float(loss(head, lambda x, y=y: y, x)) for y in (layer(x), training))
        assert abs(evaluated - trained) > 0.1
        np.testing.assert_allclose(jax.value_and_grad(loss)(head, layer, x)[0], evaluated, rtol=1e-5)
        for argnums in (1, 2, (0, 1), (0, 2)):
            np.testing.assert_allclose(jax.value_and_grad(loss, argnums)(head, layer, x)[0], trained, rtol=1e-5)


def averaged(layer, xs):
    """mu and sigma after a step of the averaging optimizer on each of the batches."""
    optimizer = bnj.partition(optax.sgd(0.0), decay=0.5)
    state = optimizer.init(layer)
    for x in xs:
        updates, state = optimizer.update(jax.grad(lambda layer: layer(x).sum())(layer), state, layer)  # noqa: B023
        layer = optax.apply_updates(layer, updates)
    return layer.mu, layer.sigma


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_batch_that_is_not_finite(value):
    """In the original the averages of the affected channel stay NaN; by default they skip the batch."""
    bad, good = jnp.asarray([[value, 1.0], [1.0, 3.0]]), jnp.asarray([[1.0, 2.0], [3.0, 6.0]])
    mu, sigma = averaged(zygote.BatchNorm(2, faithful=True), (bad, good))
    np.testing.assert_allclose(mu, [np.nan, 2.5], rtol=1e-5)
    np.testing.assert_allclose(sigma, [np.nan, 0.25 + 0.25 * 2 + 0.5 * 4], rtol=1e-5)
    with pytest.warns(RuntimeWarning, match="did not enter the running statistics") as caught:
        mu, sigma = averaged(zygote.BatchNorm(2), (bad, good))
    assert {warning.filename for warning in caught} == {__file__}
    np.testing.assert_allclose(mu, [1, 2], rtol=1e-5)
    np.testing.assert_allclose(sigma, [0.5 + 0.5 * 2, 0.5 + 0.5 * 4], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_faithful_gradients(dtype):
    """Where the original has no fault, `faithful=True` equals the default: y, all derivatives, and under `vmap`."""
    x, dy = X.astype(dtype), DY.astype(dtype)
    bound = {"rtol": 1e-4, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 3e-2, "atol": 3e-2}
    faithful, ours = (jax.jit(differentiated)(LAYER.replace(faithful=kind), x, dy) for kind in (True, False))
    for theirs, own in zip(
        jax.tree.leaves(faithful[:1] + faithful[2:]), jax.tree.leaves(ours[:1] + ours[2:]), strict=True
    ):
        assert theirs.dtype == own.dtype == dtype
        np.testing.assert_allclose(np.asarray(theirs, float), np.asarray(own, float), **bound)
    for theirs, own in zip(jax.tree.leaves(faithful[1]), jax.tree.leaves(ours[1]), strict=True):
        np.testing.assert_allclose(theirs, own, **bound)
    if dtype == jnp.float32:
        twice = [
            jax.jit(jax.grad(lambda x, layer=layer: jnp.sum(jax.grad(lambda x: jnp.sum(layer(x) ** 3))(x) * DY)))(X)
            for layer in (LAYER.replace(faithful=True), LAYER)
        ]
        np.testing.assert_allclose(*twice, rtol=1e-2, atol=1e-3)
        gradient = jax.grad(lambda x: jnp.sum(LAYER.replace(faithful=True)(x) * DY))
        batched = jax.jit(jax.vmap(gradient))(jnp.stack([X, 2 * X]))
        np.testing.assert_allclose(batched[0], faithful[2], rtol=1e-4, atol=1e-5)


def test_zero_sigma():
    """In training xhat = 0, where the original and `faithful=True` give 0 / 0; inference divides by 0 in all three."""
    theirs = results("zygote", "float64", "const", "eps0")["y"]
    assert np.isnan(theirs[:, 1:]).all()
    layer = zygote.BatchNorm(3, eps=0.0).replace(sigma=jnp.zeros(3), beta=jnp.arange(3.0))
    for faithful in (False, True):
        np.testing.assert_array_equal(layer.replace(faithful=faithful)(X[:, :, 0]), np.copysign(np.inf, X[:, :, 0]))
    constant = jnp.broadcast_to(jnp.asarray([1.0, 2.0, 4.0]), (6, 3))
    y, gradient, dx = differentiated(layer, constant, DY[:, :, 0])
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(3.0), (6, 3)))
    np.testing.assert_array_equal(dx, np.zeros((6, 3)))
    np.testing.assert_array_equal(gradient.sigma, np.zeros(3))
    y, gradient, dx = differentiated(layer.replace(faithful=True), constant, DY[:, :, 0])
    assert np.isnan(y).all()
    assert np.isnan(dx).all()
    np.testing.assert_array_equal(gradient.sigma, np.zeros(3))


def test_without_jax_the_extra_is_named():
    code = "import sys; sys.modules['jax'] = None; import batchnorm.compat.zygote"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'batchnorm.compat.zygote needs jax, which is not installed; pip install "batchnorm[jax]"' in result.stderr


def test_frameworks():
    """Importing the module loads JAX, and neither Flax nor any other framework."""
    program = "import sys, batchnorm.compat.zygote\nprint({'torch', 'flax', 'xarray', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
