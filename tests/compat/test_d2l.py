"""`compat.d2l` against the original's arrays: `faithful=True` for all, the default for those without faults."""

import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import case_inputs, relative_error, results, tolerance

from batchnorm.compat.d2l import BatchNorm, BNLeNetScratch, batch_norm
from batchnorm.training.data import load_digits

FEATURES = ("gamma", "beta")


def arrays_of(case, config, dtype):
    """The inputs and results of the original; `config` may have its own inputs."""
    theirs, inputs = dict(results("d2l", dtype, case, config)), case_inputs(case)
    given = [theirs.pop(name, inputs[name]) for name in ("x_steps", "dy", *FEATURES)]
    return [jnp.asarray(value, dtype) for value in given], theirs


def check(ours, theirs, case, dtype):
    assert {"y", "dx", "running_mean_3", "running_var_3", "y_eval_3"} <= set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == dtype, name
        assert ours[name].shape == expected.shape, name
        assert relative_error(ours[name], expected) <= tolerance("d2l", dtype, case, name), name


def statistics_after(variables, number):
    state = variables["batch_stats"]
    return {f"running_{name}_{number}": state[f"moving_{name}"] for name in ("mean", "var")}


@partial(jax.jit, static_argnums=0)
def run_module(layer, x_steps, dy, gamma, beta):
    """All results of the module, by the names of the original's arrays."""
    ours, key, predicting = {}, jax.random.key(0), layer.clone(deterministic=True)
    fresh = predicting.init(key, x_steps[0])
    for name, one in (("init", layer), ("eval_init", predicting)):
        ours |= {f"{stat}_after_{name}": a for stat, a in one.init(key, x_steps[0])["batch_stats"].items()}
    parameters = {
        name: value.reshape(fresh["params"][name].shape) for name, value in zip(FEATURES, (gamma, beta), strict=True)
    }
    variables = {**fresh, "params": parameters}
    ours["y_eval_init"] = predicting.apply(variables, x_steps[0])

    def gradients(one, variables, suffix, **options):
        def loss(x, parameters):
            y = one.apply({**variables, "params": parameters}, x, **options)
            return jnp.sum((y[0] if options else y) * dy)

        dx, others = jax.grad(loss, argnums=(0, 1))(x_steps[0], variables["params"])
        return {f"dx{suffix}": dx, f"dgamma{suffix}": others["gamma"], f"dbeta{suffix}": others["beta"]}

    ours |= gradients(layer, variables, "", mutable=["batch_stats"])
    for number, x in enumerate(x_steps, start=1):
        y, state = layer.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **state}
        ours |= statistics_after(variables, number)
        ours.setdefault("y", y)
    ours["y_eval_3"] = predicting.apply(variables, x_steps[0])
    return ours | gradients(predicting, variables, "_eval_3")


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize(("case", "dtype"), [
    *((case, "float64") for case in ("d2", "single", "const", "ill")), ("d2", "float32"), ("const", "float32"),
])  # fmt: skip
def test_module_on_rows(case, dtype, faithful):
    """Both modes reproduce the original on (N, C), except that by default `init` makes no update."""
    with jax.enable_x64(dtype == "float64"):
        given, theirs = arrays_of(case, "default", dtype)
        ours = run_module(BatchNorm(case_inputs(case)["x"].shape[-1], 2, faithful=faithful), *given)
        if not faithful:
            for name, fresh in (("moving_mean_after_init", 0), ("moving_var_after_init", 1)):
                np.testing.assert_array_equal(ours[name], np.full((1, given[2].size), fresh))
                assert dtype == "float32" or np.abs(theirs.pop(name) - fresh).max() > 1e-3
        check(ours, theirs, case, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("config", "features"), [("module_asis_nf3", 3), ("module_nhwc_nf4", 4)])
def test_faithful_module_on_images(config, features, dtype):
    """Statistics of each image row, and a state that grows to (1, H, 1, C)."""
    with jax.enable_x64(dtype == "float64"):
        given, theirs = arrays_of("d4", config, dtype)
        height = given[0].shape[2]
        assert theirs["running_mean_1"].shape == (1, height, 1, features)
        check(run_module(BatchNorm(features, 4, faithful=True), *given), theirs, "d4", dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_module_on_images(dtype):
    """The default has statistics per channel: the original function's results for (N, C, H, W), transposed."""
    with jax.enable_x64(dtype == "float64"):
        given, others = arrays_of("d4", "module_nhwc_nf4", dtype)
        _, theirs = arrays_of("d4", "func_nchw", dtype)
        ours = run_module(BatchNorm(4, 4), *given)
    theirs = {name: np.moveaxis(value, 1, -1) for name, value in theirs.items()}
    check(ours, theirs, "d4", dtype)
    assert ours["running_var_3"].shape == (1, 1, 1, 4)
    np.testing.assert_array_equal(ours["moving_var_after_init"], np.ones((1, 1, 1, 4)))
    assert relative_error(ours["y"], others["y"]) > 0.1  # statistics of each row differ


@partial(jax.jit, static_argnames=("faithful", "eps", "momentum"))
def run_function(x_steps, dy, gamma, beta, *, faithful, eps, momentum):
    """All results of the function, which has no gradients of prediction and no `init`."""

    def state():
        return [SimpleNamespace(value=f(gamma.shape, gamma.dtype)) for f in (jnp.zeros, jnp.ones)]

    call = partial(batch_norm, eps=eps, momentum=momentum, faithful=faithful)

    def loss(x, gamma, beta):
        return jnp.sum(call(x, False, gamma, beta, *state()) * dy)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(x_steps[0], gamma, beta)
    ours, moving = dict(zip(("dx", "dgamma", "dbeta"), gradients, strict=True)), state()
    for number, x in enumerate(x_steps, start=1):
        y = call(x, False, gamma, beta, *moving)
        ours.setdefault("y", y)
        for name, variable in zip(("mean", "var"), moving, strict=True):
            ours[f"running_{name}_{number}"] = variable.value
    ours["y_eval_3"] = call(x_steps[0], True, gamma, beta, *moving)
    return ours


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize(("case", "config", "dtype", "eps", "momentum"), [
    ("d2", "func_eps1e-3_mom0.5", "float64", 1e-3, 0.5), ("d2", "func_eps1e-3_mom0.5", "float32", 1e-3, 0.5),
    ("d4", "func_nchw", "float64", 1e-5, 0.9), ("single4", "func_nchw", "float32", 1e-5, 0.9),
    ("ill", "func_eps0", "float64", 0.0, 0.9),
])  # fmt: skip
def test_function(case, config, dtype, eps, momentum, faithful):
    """Parameters (C,) lie on the last axis; (1, C, 1, 1) are channels first. No fault shows in either."""
    with jax.enable_x64(dtype == "float64"):
        given, theirs = arrays_of(case, config, dtype)
        options = {"faithful": faithful, "eps": eps, "momentum": momentum}
        check(run_function(*given, **options), theirs, case, dtype)


def test_constant_channel_without_eps():
    """0/0 in the original; by default xhat = 0, the limit."""
    with jax.enable_x64(True):
        given, theirs = arrays_of("const", "func_eps0", "float64")
        for faithful in (False, True):
            ours = run_function(*given, faithful=faithful, eps=0.0, momentum=0.9)
            if faithful:
                np.testing.assert_allclose(ours["y"], theirs["y"], rtol=1e-12, equal_nan=True)
                assert np.isnan(ours["y"][:, 1:]).any()
            else:
                np.testing.assert_array_equal(ours["y"][:, 1:], np.broadcast_to(given[3][1:], (8, 3)))
                np.testing.assert_array_equal(ours["dx"][:, 1:], 0)


def test_batch_that_is_not_finite():
    """In the original the state of the affected channel stays NaN; by default the batch is skipped."""
    bad, good = jnp.asarray([[jnp.nan, 1.0], [1.0, 3.0]]), jnp.asarray([[1.0, 2.0], [3.0, 6.0]])
    for faithful, mean, var in ((True, [np.nan, 1.12], [np.nan, 1.6]), (False, [0.4, 0.8], [1, 1.6])):
        moving = [SimpleNamespace(value=f((1, 2))) for f in (jnp.zeros, jnp.ones)]
        call = partial(batch_norm, gamma=jnp.ones(2), beta=jnp.zeros(2), eps=0.0, momentum=0.8, faithful=faithful)
        warns = nullcontext([]) if faithful else pytest.warns(RuntimeWarning, match="did not enter .*; faithful=True")
        with warns as caught:
            call(bad, False, moving_mean=moving[0], moving_var=moving[1])
        assert [warning.filename for warning in caught] == [__file__] * (not faithful)
        call(good, False, moving_mean=moving[0], moving_var=moving[1])
        np.testing.assert_allclose(moving[0].value[0], mean, rtol=1e-6)
        np.testing.assert_allclose(moving[1].value[0], var, rtol=1e-6)


def test_parameters_of_one_element():
    """The original broadcasts them to several channels, and the state grows; by default they are refused."""
    X = jnp.asarray(np.random.default_rng(2).normal(2, 3, (6, 4)), jnp.float32)
    variables = BatchNorm(1, 2, faithful=True).init(jax.random.key(0), X)
    assert variables["params"]["gamma"].shape == (1, 1)
    np.testing.assert_allclose(variables["batch_stats"]["moving_mean"], 0.1 * X.mean(0, keepdims=True), rtol=1e-5)
    with pytest.raises(ValueError, match=r"X has shape \(6, 4\), which does not fit gamma \(1, 1\)"):
        BatchNorm(1, 2).init(jax.random.key(0), X)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"X": [[1.0], [3.0]]}, TypeError, r"^X is a list; it must be an array: pass jnp.asarray\(X\)"),
    ({"moving_mean": jnp.zeros(1)}, TypeError, "^moving_mean is a .*; it must be a Flax variable, or another"),
    ({"moving_var": 1.0}, TypeError, "^moving_var is a float; it must be a Flax variable"),
    ({"eps": None}, TypeError, "^eps is None .*added to the variance"),
    ({"eps": -1.0}, ValueError, "^eps is -1.0; it is added to the variance"),
    ({"momentum": None}, TypeError, "^momentum is None"),
    ({"momentum": "a"}, TypeError, "^momentum is 'a'"),
    ({"momentum": 2.0}, ValueError, "^momentum is 2.0; it is the weight of the old value and must be"),
    ({"momentum": jnp.asarray(2.0)}, ValueError, "^momentum is 2.0; it is the weight of the old value"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, error, message, faithful):
    moving = dict(zip(("moving_mean", "moving_var"), variables_like((1,), (1,)), strict=True))
    given = {"X": jnp.ones((2, 1)), "deterministic": False, "gamma": jnp.ones(1), "beta": jnp.zeros(1), **moving,
             "eps": 1e-5, "momentum": 0.9}  # fmt: skip
    with pytest.raises(error, match=message):
        batch_norm(**(given | arguments), faithful=faithful)
    np.testing.assert_array_equal([variable.value for variable in moving.values()], np.ones((2, 1)))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"gamma": 1.0}, "^gamma is a float; it must be an array"),
    ({"beta": jnp.zeros(1, int)}, "^beta has dtype int32"),
    ({"moving_mean": SimpleNamespace(value=jnp.zeros(1, int))}, "^moving_mean has dtype int32"),
])  # fmt: skip
def test_arrays_are_checked(arguments, message):
    mean, var = variables_like((1,), (1,))
    given = {"gamma": jnp.ones(1), "beta": jnp.zeros(1), "moving_mean": mean, "moving_var": var}
    with pytest.raises(TypeError, match=message):
        batch_norm(jnp.ones((2, 1)), False, **(given | arguments), eps=1e-5, momentum=0.9)


def test_arrays_of_numpy():
    """Float64 parameters and state of NumPy are accepted without a warning, although JAX needs x64 mode for float64."""
    X, ones = np.asarray([[1.0], [3.0]]), np.ones((1, 1))
    mean, var = SimpleNamespace(value=np.zeros((1, 1))), SimpleNamespace(value=np.ones((1, 1)))
    Y = batch_norm(X, False, ones, 0 * ones, mean, var, 1e-5, 0.5)
    np.testing.assert_allclose(Y, [[-1], [1]], rtol=1e-4)
    np.testing.assert_array_equal([mean.value, var.value], [[[1]], [[1]]])


def test_numbers_may_be_traced():
    """A schedule of momentum under `jit`, and a scalar array outside of it."""
    X = jnp.asarray([[1.0], [3.0]])

    def mean_after(momentum):
        mean, var = SimpleNamespace(value=jnp.zeros(1)), SimpleNamespace(value=jnp.ones(1))
        batch_norm(X, False, jnp.ones(1), jnp.zeros(1), mean, var, 1e-5, momentum)
        return mean.value

    for call in (mean_after, jax.jit(mean_after)):
        np.testing.assert_allclose(call(jnp.asarray(0.75)), [0.5], rtol=1e-6)


def test_dtypes_of_the_original():
    """Y has the common dtype of X and the parameters, and the state keeps its own."""
    mean, var = (SimpleNamespace(value=f((1, 3), jnp.float32)) for f in (jnp.zeros, jnp.ones))
    X = jnp.asarray(np.random.default_rng(1).normal(2, 3, (8, 3)), jnp.bfloat16)
    parameters = jnp.ones((1, 3)), jnp.zeros((1, 3))
    Y = batch_norm(X, False, *parameters, mean, var, 1e-5, 0.9)
    assert (Y.dtype, mean.value.dtype) == (jnp.float32, jnp.float32)
    wide = X.astype(jnp.float32)
    np.testing.assert_allclose(Y, (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean.value[0], 0.1 * wide.mean(0), rtol=1e-5)
    Y = batch_norm(np.arange(6).reshape(2, 3), False, *parameters, mean, var, 1e-5, 0.9)
    np.testing.assert_allclose(Y, np.outer([-1, 1], np.ones(3)), rtol=1e-5)


def variables_like(*shapes):
    return [SimpleNamespace(value=jnp.ones(shape)) for shape in shapes]


IMAGES, C4 = jnp.ones((6, 5, 3, 4)), (1, 1, 1, 4)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("X", "shape", "state", "message"), [
    (jnp.ones((2, 3, 4)), (1, 4), (1, 4), r"\(2, 3, 4\); it must have 2 or 4 dimensions"),
    (IMAGES, (1, 1, 1, 5), (1, 1, 1, 5), r"\(6, 5, 3, 4\), which does not fit gamma \(1, 1, 1, 5\)"),
    (jnp.ones((6, 4, 5, 3)), C4, C4, r"\(1, C, 1, 1\) for \(N, C, H, W\)"),
    (IMAGES, C4, (1, 5, 1, 4), r"moving_mean \(1, 5, 1, 4\).*only faithful=True takes \(1, H, 1, C\)"),
    (jnp.ones((6, 4)), C4, C4, r"pass \(1, C\)"),
])  # fmt: skip
def test_shapes_that_do_not_fit(X, shape, state, message, deterministic):
    """Prediction checks them too; the state is not touched."""
    moving = variables_like(state, state)
    with pytest.raises(ValueError, match=message):
        batch_norm(X, deterministic, jnp.ones(shape), jnp.zeros(shape), *moving, 1e-5, 0.9)
    np.testing.assert_array_equal([v.value for v in moving], np.ones((2, *state)))


def test_rank_in_faithful_mode():
    """Prediction accepts any rank and training does not, as in the original."""
    X, moving = jnp.full((2, 3, 4), 3.0), variables_like((1, 4), (1, 4))
    Y = batch_norm(X, True, jnp.ones(4), jnp.zeros(4), *moving, 0.0, 0.9, faithful=True)
    np.testing.assert_array_equal(Y, np.full((2, 3, 4), 2.0))
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        batch_norm(X, False, jnp.ones(4), jnp.zeros(4), *moving, 0.0, 0.9, faithful=True)


@pytest.mark.parametrize(("num_dims", "shape"), [(2, (6, 5, 3, 4)), (4, (6, 4)), (3, (6, 4))])
def test_module_refuses_another_rank(num_dims, shape):
    with pytest.raises(ValueError, match=f"but num_dims is {num_dims}: pass the rank of X, 2 or 4"):
        BatchNorm(4, num_dims).init(jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize(("faithful", "height"), [(False, 1), (True, 28)])
def test_lenet_variables(faithful, height):
    """Parameters under the original's names; only the faithful state changes its shape."""
    variables = jax.eval_shape(BNLeNetScratch(faithful=faithful).init, jax.random.key(0), jnp.ones((2, 28, 28, 1)))
    parameters, state = variables["params"]["net"], variables["batch_stats"]["net"]
    assert set(parameters) == {f"layers_{i}" for i in (0, 1, 4, 5, 9, 10, 12, 13, 15)}
    shapes = {name: parameters[name]["gamma"].shape for name in state}
    assert shapes == {"layers_1": (1, 1, 1, 6), "layers_5": (1, 1, 1, 16), "layers_10": (1, 120), "layers_13": (1, 84)}
    assert state["layers_1"]["moving_mean"].shape == (1, height, 1, 6)


def test_lenet_learns():
    """Loss and accuracy on handwritten digits of 14x14 pixels; gamma and beta, read as on the page, have changed."""
    digits, model, batch = load_digits(), BNLeNetScratch(), 32
    X, test_X = (jnp.asarray(images)[:, ::2, ::2, None] for images in (digits.train_images, digits.test_images))
    labels = jnp.asarray(digits.train_labels)
    variables = jax.jit(model.init)(jax.random.key(0), X[:batch])
    optimizer = optax.sgd(model.lr)

    @jax.jit
    def step(variables, X, labels):
        def loss(parameters):
            logits, state = model.apply({**variables, "params": parameters}, X, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, _ = optimizer.update(gradients, optimizer.init(variables["params"]))
        return {"params": optax.apply_updates(variables["params"], updates), **state}, value

    order, losses = np.random.default_rng(0), []
    for _ in range(8):
        batches = order.permutation(len(X))[: len(X) // batch * batch].reshape(-1, batch)
        for rows in batches:
            variables, value = step(variables, X[rows], labels[rows])
            losses.append(float(value))
    first, last = np.mean(losses[: len(batches)]), np.mean(losses[-len(batches) :])
    assert first > 1.2
    assert last < 0.3 * first
    logits = jax.jit(model.clone(training=False).apply)(variables, test_X)
    assert np.mean(np.argmax(logits, axis=-1) == digits.test_labels) > 0.88
    layer = variables["params"]["net"]["layers_1"]
    gamma, beta = layer["gamma"].reshape((-1,)), layer["beta"].reshape((-1,))
    assert gamma.shape == beta.shape == (6,)
    assert np.abs(gamma - 1).max() > 0.1
    assert np.abs(beta).max() > 0.1


@pytest.mark.parametrize("missing", ["jax", "flax"])
def test_without_a_framework_the_extra_is_named(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import batchnorm.compat.d2l"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    expected = f'batchnorm.compat.d2l needs {missing}, which is not installed; pip install "batchnorm[jax]"'
    assert expected in result.stderr


def test_frameworks():
    """Importing the module loads JAX and Flax, and no other framework."""
    program = "import sys, batchnorm.compat.d2l\nprint({'torch', 'xarray', 'sklearn', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
