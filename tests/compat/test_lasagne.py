"""`batchnorm.compat.lasagne` against the original on Theano, on each array library, and behind layers."""

import copy
import re
import subprocess
import sys
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from golden import case_inputs, load, meta, relative_error, results, tolerance
from libraries import LIBRARIES, by_name
from torch.utils.checkpoint import checkpoint

from batchnorm.compat.lasagne import BatchNormLayer, batch_norm, identity
from batchnorm.compat.shared import Shared

SYSTEMS = ("lasagne_theano105_py37", "lasagne_theano082_py27")
THEANO = SYSTEMS[0]
OPTIONS = {key: value for key, value in meta(THEANO)["configs"].items() if "/" in key}


def made(config, shape, *, faithful=False):
    """The layer of a configuration of the golden arrays."""
    options = dict(OPTIONS[config])
    if isinstance(options.get("axes"), list):
        options["axes"] = tuple(options["axes"])
    return BatchNormLayer(shape, **options, faithful=faithful)


def cells():
    for system in SYSTEMS:
        for name in sorted({key.rpartition("/")[0] for key in load(system)} - {""}):
            dtype, _, config = name.partition("/")
            if "/" in config and (dtype, config[:3]) != ("f32", "ill"):  # every system is 2 to 5 % off there
                is_compiled = system == THEANO and name in ("f64/d2/default", "f64/seq/axes_01", "f32/d2/default")
                for library in ("numpy", "torch", "jax")[: 3 if is_compiled else 2]:  # JAX takes seconds for each
                    yield pytest.param(
                        system, "float64" if dtype == "f64" else "float32", config, LIBRARIES[library],
                        id=f"{system}-{name}-{library}",
                    )  # fmt: skip


def replayed(layer, library, dtype, inputs, theirs):
    """The results of the original's generator: evaluation, gradients, three steps, evaluation with gradients."""
    xs, dy = [library.array(x, dtype) for x in inputs["x_steps"]], library.array(inputs["dy"], dtype)
    for shared, name in ((layer.gamma, "gamma"), (layer.beta, "beta")):
        shared.set_value(theirs[name])
    ours = {"y_eval_init": layer.get_output_for(xs[0], deterministic=True)}
    start = {shared.name: shared.get_value() for shared in layer.params}

    def gradients(values, deterministic):
        def loss(x, gamma, beta):
            y, _ = layer.apply(values | {"gamma": gamma, "beta": beta}, x, deterministic)
            return (y * dy).sum()

        return library.gradients(loss, xs[0], values["gamma"], values["beta"]) if library.differentiates else ()

    ours |= dict(zip(("dx", "dgamma", "dbeta"), gradients(start, False), strict=False))
    for step, x in enumerate(xs, start=1):
        y = layer.get_output_for(x)
        ours.setdefault("y", y)
        ours |= {f"running_{name}_{step}": getattr(layer, name).get_value() for name in ("mean", "std")}
    ours["y_eval_3"] = layer.get_output_for(xs[0], deterministic=True)
    end = start | {name: getattr(layer, name).get_value() for name in ("mean", "std")}
    ours |= dict(zip(("dx_eval_3", "dgamma_eval_3", "dbeta_eval_3"), gradients(end, True), strict=False))
    return {name: library.numpy(value) for name, value in ours.items()}


@pytest.mark.parametrize(("system", "dtype", "config", "library"), list(cells()))
def test_original(system, dtype, config, library):
    """Every array of the original where it is finite, in its shape."""
    case = config.partition("/")[0]
    theirs, inputs = results(system, dtype, case, config.partition("/")[2]), case_inputs(case)
    with library.context(dtype):
        ours = replayed(made(config, inputs["x"].shape), library, dtype, inputs, theirs)
    assert not library.differentiates or ours.keys() == theirs.keys() - {"gamma", "beta"}
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        assert value.dtype == dtype, name
        assert np.isfinite(value).all(), name
        assert relative_error(value, theirs[name]) <= tolerance(system, dtype, case, name), name


@pytest.mark.parametrize(("config", "library"), [
    ("const/default", LIBRARIES["torch"]),
    ("const/eps0", LIBRARIES["torch"]),
    ("single/default", LIBRARIES["torch"]),
    ("single4/default", LIBRARIES["torch"]),
    ("const/default", LIBRARIES["jax"]),
    ("const/eps0", LIBRARIES["jax"]),
])  # fmt: skip
def test_gradient_of_a_constant_channel(config, library):
    """NaN in the original and if faithful; by default gamma / epsilon * (dy - mean(dy)), or 0 without epsilon."""
    case, _, name = config.partition("/")
    theirs, inputs = results(THEANO, "float64", case, name), case_inputs(case)
    with library.context("float64"):
        faithful, ours = (
            replayed(made(config, inputs["x"].shape, faithful=kind), library, "float64", inputs, theirs)
            for kind in (True, False)
        )
    constant = np.isnan(theirs["dx"])
    assert constant.any()
    for result, expected in theirs.items():
        if result not in ("gamma", "beta"):
            np.testing.assert_array_equal(np.isnan(faithful[result]), np.isnan(expected), result)
            assert relative_error(faithful[result], expected) <= 1e-12, result
    limit = inputs["dy"] - inputs["dy"].mean(axis=0, keepdims=True)
    limit = theirs["gamma"] / 0.01 * limit if name == "default" else np.zeros_like(limit)
    np.testing.assert_allclose(ours["dx"][constant], limit[constant], rtol=1e-9, atol=1e-12)
    beta = np.broadcast_to(theirs["beta"], constant.shape)
    np.testing.assert_array_equal(ours["y"][constant], beta[constant])


def test_faithful_without_gradients():
    """NumPy: y is 0/0 where std and epsilon are 0, and the averages are the same in either case."""
    x = np.array([[1.0, 5.0], [3.0, 5.0]])
    faithful, ours = (BatchNormLayer((2, 2), epsilon=0, faithful=kind) for kind in (True, False))
    with pytest.warns(RuntimeWarning, match="divide by zero|invalid value"):
        y = faithful.get_output_for(x)
    np.testing.assert_array_equal(y, [[-1, np.nan], [1, np.nan]])
    np.testing.assert_array_equal(ours.get_output_for(x), [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(faithful.std.get_value(), [[1.0, 0.5]])
    np.testing.assert_array_equal(ours.std.get_value(), [[1.0, 0.5]])


class Dense:
    """A layer in Lasagne's style: W, and b unless it is None."""

    def __init__(self, W, b=0.0, nonlinearity="rectify"):
        self.W, self.nonlinearity, self.output_shape = Shared("W", W.shape, 0.0), nonlinearity, (None, W.shape[1])
        self.W.set_value(W)
        self.params = {self.W: {"trainable", "regularizable"}}
        self.b = None if b is None else Shared("b", (W.shape[1],), b)
        if self.b is not None:
            self.params[self.b] = {"trainable"}

    def get_output_for(self, x):
        y = x @ self.W.get_value()
        y = y if self.b is None else y + self.b.get_value()
        return np.maximum(y, 0) if self.nonlinearity == "rectify" else self.nonlinearity(y)


@pytest.mark.parametrize("system", SYSTEMS)
def test_batch_norm_of_a_dense_layer(system):
    theirs, about = results_of(system, "batch_norm_dense")
    dense = Dense(theirs["W"], b=3.0)
    layer = batch_norm(dense)
    layer.gamma.set_value(theirs["gamma"])
    layer.beta.set_value(theirs["beta"])
    shares = [*dense.params, *layer.params]
    assert [shared.name for shared in shares] == about["params_after"]
    for tag in ("trainable", "regularizable"):
        tagged = [shared.name for shared in shares if tag in (dense.params | layer.params)[shared]]
        assert tagged == about[f"{tag}_after"]
        assert layer.get_params(**{tag: True}) == [s for s in layer.params if s.name in tagged]
        assert layer.get_params(**{tag: False}) == [s for s in layer.params if s.name not in tagged]
    assert (dense.b is None, dense.nonlinearity, layer.nonlinearity) == (True, identity, "rectify")
    assert (layer.input_layer, layer.axes, list(layer.mean.get_value().shape)) == (dense, (0,), about["stat_shape"])
    for step, x in enumerate(theirs["x_steps"], start=1):
        before = dense.get_output_for(x)
        if step == 1:
            assert relative_error(before, theirs["pre_bn"]) <= 1e-12
            assert relative_error(layer.get_output_for(before, deterministic=True), theirs["y_eval_init"]) <= 1e-12
        y = layer.get_output_for(before)
        assert step > 1 or relative_error(y, theirs["y"]) <= 1e-12
        assert relative_error(layer.mean.get_value(), theirs[f"running_mean_{step}"]) <= 1e-12
        assert relative_error(layer.std.get_value(), theirs[f"running_std_{step}"]) <= 1e-12
    before = dense.get_output_for(theirs["x_steps"][0])
    assert relative_error(layer.get_output_for(before, deterministic=True), theirs["y_eval_3"]) <= 1e-12


def results_of(system, name):
    prefix = f"f64/{name}/"
    arrays = {key.removeprefix(prefix): value for key, value in load(system).items() if key.startswith(prefix)}
    return arrays, meta(THEANO)["configs"][name]


@pytest.mark.parametrize("name", ["batch_norm_dense", "batch_norm_conv2d"])
def test_batch_norm_of_torch_layers(name):
    """The original's arrays by `torch.nn`, whose convolution, unlike Lasagne's, does not flip the kernel."""
    theirs, _ = results_of(THEANO, name)
    weight = torch.from_numpy(theirs["W"].T if name.endswith("dense") else theirs["W"][..., ::-1, ::-1].copy())
    inner = torch.nn.Linear(5, 4) if name.endswith("dense") else torch.nn.Conv2d(4, 3, (3, 2))
    layer = batch_norm(torch.nn.Sequential(inner.double(), torch.nn.ReLU()))
    norm = layer[-1]
    assert (inner.bias, len(layer)) == (None, 2)
    with torch.no_grad():
        inner.weight.copy_(weight)
        norm.weight.copy_(torch.from_numpy(theirs["gamma"].ravel()))
        norm.bias.copy_(torch.from_numpy(theirs["beta"].ravel()))
    xs = torch.from_numpy(theirs["x_steps"])
    ours = {"y_eval_init": layer.eval()(xs[0])}
    x = xs[0].clone().requires_grad_()
    ours["y"] = layer.train()(x)
    (ours["y"] * torch.from_numpy(theirs["dy"])).sum().backward()
    flipped = inner.weight.grad.T if name.endswith("dense") else inner.weight.grad.flip(-1, -2)
    ours |= {"dx": x.grad, "dW": flipped, "dgamma": norm.weight.grad, "dbeta": norm.bias.grad}
    for step in (1, 2, 3):
        if step > 1:
            layer(xs[step - 1])
        ours |= {f"running_mean_{step}": norm.running_mean.clone(), f"running_std_{step}": norm.running_var.clone()}
    ours["y_eval_3"] = layer.eval()(xs[0])
    for key, value in ours.items():
        assert relative_error(value.detach().numpy(), theirs[key]) <= 1e-12, key


def test_batch_norm_of_torch_layers_keeps_what_they_are():
    linear = torch.nn.Linear(3, 2, bias=False).eval()
    norm = batch_norm(linear)[-1]
    assert (norm.training, norm.convention, norm.bias.tolist()) == (False, "lasagne-gist", [0.0, 0.0])
    for training in (False, True):
        layer = batch_norm(torch.nn.Linear(3, 2).train(training))
        assert [module.training for module in layer.modules()] == [training] * 3
    with pytest.raises(ValueError, match="faithful is True, but Linear is not a layer in Lasagne's style"):
        batch_norm(torch.nn.Linear(3, 2), faithful=True)
    with pytest.raises(TypeError, match="cannot normalize the result of ReLU"):
        batch_norm(torch.nn.ReLU())


def flax_layer(kind, theirs):
    """The dense layer of the arrays by Flax; functions of x that evaluate and train it, and its averages."""
    if kind == "linen":
        inner = flax.linen.Dense(4, param_dtype=jnp.float64)
        layer = batch_norm(flax.linen.Sequential([inner, flax.linen.relu]))
        variables = layer.init(jax.random.key(0), jnp.asarray(theirs["x_steps"][0]), use_running_average=True)
        norm = {"scale": theirs["gamma"].ravel(), "bias": theirs["beta"].ravel()}
        state = {"params": {"layers_0": {"kernel": theirs["W"]}, "norm": norm}}
        assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(np.shape, state["params"])
        state["batch_stats"] = variables["batch_stats"]

        def train(x):
            y, updated = layer.apply(state, x, use_running_average=False, mutable=["batch_stats"])
            state.update(updated)
            return y

        return (lambda x: layer.apply(state, x, use_running_average=True)), train, lambda: state["batch_stats"]["norm"]
    inner = nnx.Linear(5, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    layer = batch_norm(nnx.Sequential(inner, nnx.relu))
    norm = layer.layers[-1]
    inner.kernel[...], norm.scale[...], norm.bias[...] = (
        jnp.asarray(value) for value in (theirs["W"], theirs["gamma"].ravel(), theirs["beta"].ravel())
    )

    def evaluate(x):
        norm.use_running_average = True
        y = layer(x)
        norm.use_running_average = False
        return y

    return evaluate, layer, lambda: {"mean": norm.mean[...], "std": norm.std[...]}


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_batch_norm_of_flax_layers(kind):
    theirs, _ = results_of(THEANO, "batch_norm_dense")
    with jax.enable_x64(True):
        evaluate, train, averages = flax_layer(kind, theirs)
        xs = jnp.asarray(theirs["x_steps"])
        ours = {"y_eval_init": evaluate(xs[0])}
        for step, x in enumerate(xs, start=1):
            y = train(x)
            ours.setdefault("y", y)
            ours |= {f"running_{name}_{step}": averages()[name] for name in ("mean", "std")}
        ours["y_eval_3"] = evaluate(xs[0])
        for name, value in ours.items():
            assert relative_error(value, theirs[name]) <= 3e-7, name  # Flax's statistics are float32


def flax_layers():
    """Layers with as many features as axis 1 has indices, and with others; x of their input."""
    x = jax.random.normal(jax.random.key(0), (4, 3, 6, 2)) * 2 + 1
    for features in (3, 5):
        yield "linen", flax.linen.Conv(features, (3, 3)), x
        yield "linen", flax.linen.Dense(features), x[:, :, 0]
        yield "linen", flax.linen.ConvTranspose(features, (3, 3)), x
        yield "nnx", nnx.Conv(2, features, (3, 3), rngs=nnx.Rngs(0)), x
        yield "nnx", nnx.Linear(2, features, rngs=nnx.Rngs(0)), x[:, :, 0]
        yield "nnx", nnx.ConvTranspose(2, features, (3, 3), rngs=nnx.Rngs(0)), x


@pytest.mark.parametrize(("kind", "inner", "x"), [
    pytest.param(*layer, id=f"{layer[0]}-{type(layer[1]).__name__}-{number}")
    for number, layer in enumerate(flax_layers())
])  # fmt: skip
def test_batch_norm_of_flax_layers_normalizes_their_features(kind, inner, x):
    """The last axis, for inputs of any rank: y, the averages, and the gradient of x."""
    if kind == "linen":
        layer = batch_norm(inner)
        variables = layer.init(jax.random.key(1), x, use_running_average=True)
        bare = inner.clone(use_bias=False).bind({"params": variables["params"]["layers_0"]})

        def call(x):
            return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

        y, updated = call(x)
        averages, dx = updated["batch_stats"]["norm"], jax.grad(lambda x: (call(x)[0] ** 3).sum())(x)
    else:
        layer, bare = batch_norm(inner), inner  # its bias has moved to the batch norm
        y, norm = layer(x), layer.layers[-1]
        averages = {"mean": norm.mean[...], "std": norm.std[...]}
        dx = nnx.grad(lambda layer, x: (layer(x) ** 3).sum(), argnums=1)(layer, x)
    axes = tuple(range(x.ndim - 1))

    def expected(x):
        z = bare(x)
        return (z - z.mean(axes)) / (z.std(axes) + 0.01)

    np.testing.assert_allclose(y, expected(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(averages["mean"], 0.5 * bare(x).mean(axes), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(averages["std"], 0.5 + 0.5 * bare(x).std(axes), rtol=1e-5)
    theirs = jax.grad(lambda x: (expected(x) ** 3).sum())(x)
    np.testing.assert_allclose(dx, theirs, rtol=2e-3, atol=2e-3 * np.abs(theirs).max())


def test_batch_norm_of_flax_layers_keeps_what_they_are():
    convolution = batch_norm(flax.linen.Conv(4, (3, 3), param_dtype=jnp.bfloat16))
    assert (convolution.norm.convention, convolution.norm.epsilon, convolution.norm.momentum) == (
        "lasagne-gist",
        0.01,
        0.5,
    )
    assert (convolution.norm.activation, convolution.norm.param_dtype) == (None, jnp.bfloat16)
    linear = nnx.Linear(3, 2, bias_init=nnx.initializers.constant(4.0), rngs=nnx.Rngs(0))
    norm = batch_norm(linear).layers[-1]
    assert (linear.bias, norm.bias[...].tolist(), norm.epsilon, norm.momentum) == (None, [4, 4], 0.01, 0.5)
    with pytest.raises(ValueError, match="faithful is True, but Linear is not a layer in Lasagne's style"):
        batch_norm(linear, faithful=True)


def test_batch_norm_without_a_bias_or_a_nonlinearity():
    """The original raises `KeyError: None`."""
    assert meta(THEANO)["errors"]["batch_norm(DenseLayer(b=None))"] == "KeyError: None"
    dense = Dense(np.eye(3), b=None, nonlinearity=np.tanh)
    layer = batch_norm(dense)
    x = np.random.default_rng(0).normal(size=(7, 3))
    z = (x - x.mean(axis=0)) / (x.std(axis=0) + 0.01)
    np.testing.assert_allclose(layer.get_output_for(dense.get_output_for(x)), np.tanh(z), rtol=1e-12)
    stacked = batch_norm(layer)  # a layer that never had a bias
    assert (layer.nonlinearity, stacked.nonlinearity) == (identity, np.tanh)
    bare = type("Bare", (), {"output_shape": (None, 3)})()
    assert batch_norm(bare, faithful=True).faithful
    assert not hasattr(bare, "nonlinearity")


def test_batch_norm_that_is_refused_changes_nothing():
    dense = Dense(np.eye(3), b=1.0)
    dense.output_shape = (None, None)
    with pytest.raises(ValueError, match="give all other sizes"):
        batch_norm(dense)
    assert (dense.nonlinearity, len(dense.params), dense.b in dense.params) == ("rectify", 2, True)
    with pytest.raises(TypeError, match="layer is a dict; it must have an output_shape"):
        batch_norm({})
    bare = SimpleNamespace(output_shape=(None, 3), nonlinearity=np.tanh, b=Shared("b", (3,), 0.0))
    with pytest.raises(TypeError, match="layer has a bias b, but params is a NoneType; it must be the dictionary"):
        batch_norm(bare)
    assert (bare.nonlinearity, bare.b.name) == (np.tanh, "b")


@pytest.mark.parametrize(("axes", "same"), [(-1, 2), ((-3, -1), (0, 2)), ((0, -1, 1), (0, 1, 2))])
def test_negative_axes(axes, same):
    x = np.random.default_rng(1).normal(size=(4, 5, 6))
    ours, expected = BatchNormLayer(x.shape, axes), BatchNormLayer(x.shape, same)
    np.testing.assert_array_equal(ours.get_output_for(x), expected.get_output_for(x))
    np.testing.assert_array_equal(ours.mean.get_value(), expected.mean.get_value())
    np.testing.assert_allclose(2 * ours.mean.get_value(), x.mean(axis=same, keepdims=True), rtol=1e-12)


class Unhashable:
    """An unhashable callable, like instances of classes that define `__eq__`."""

    __hash__ = None

    def __call__(self, z):
        return z + 5


@pytest.mark.parametrize(("axes", "same"), [
    ([0], (0,)), (range(0, 3, 2), (0, 2)), (np.int64(-1), (2,)), (np.array([2, 0]), (0, 2)),
])  # fmt: skip
def test_axes_in_other_sequences(axes, same):
    assert BatchNormLayer((2, 3, 4), axes).axes == same


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (((None, 5), 1), ValueError, "give all other sizes"),
    (((None, 5), -1), ValueError, "give all other sizes"),
    (((3, 5), ()), ValueError, "name some"),
    (((3, 5), 2), ValueError, r"^axes is 2 .* 2 is out of range: the axes to normalize over are among -2 to 1$"),
    (((3, 5), (0, -2)), ValueError, r"^axes is \(0, -2\) .*names an axis twice"),
    (((3, 5), (0.0,)), TypeError, r"^axes is \(0.0,\); it must be an integer, or several"),
    (((3, 5), True), TypeError, "^axes is True"),
    (((3, 5), "a"), TypeError, "^axes is 'a'"),
    (((3, 5), None, -0.1), ValueError, "^epsilon is -0.1; it is added to the standard deviation"),
    (((3, 5), None, None), TypeError, "^epsilon is None"),
    (((3, 5), None, 0.01, 1.5), ValueError, "^alpha is 1.5; it is the weight of the batch and must"),
    (((3, 5), None, 0.01, "a"), TypeError, "^alpha is 'a'"),
    (((3, 5), None, 0.01, 0.5, "rectifi"), ValueError, "^nonlinearity is 'rectifi'; of Lasagne's, identity, "),
    (((3, 5), None, 0.01, 0.5, "elu"), ValueError, r"pass others, as elu, .*, as callables on the array$"),
    (((3, 5), None, 0.01, 0.5, 3), TypeError, "^nonlinearity is 3; it must be a name, a callable"),
    (((3, 5), None, 0.01, 0.5, [1]), TypeError, r"^nonlinearity is \[1\]"),
    ((5,), TypeError, "^incoming is 5; it must be a layer with an output_shape, or a shape"),
    ((None,), TypeError, "^incoming is None"),
    ((np.ones((3, 5)),), TypeError, "^incoming is array"),
    (((None, 2.0),), TypeError, r"^incoming is \(None, 2.0\)"),
    (((None, -2),), ValueError, r"shape is \(None, -2\); it must have .* no negative size"),
    (((),), ValueError, r"shape is \(\); it must have a dimension"),
])  # fmt: skip
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchNormLayer(*arguments)


def test_wrong_inputs_are_refused():
    layer = BatchNormLayer((None, 5))
    for first in (torch.ones(2, 4), torch.ones(5), torch.ones(2, 5, dtype=torch.int64)):  # refused, they fix no library
        with pytest.raises((ValueError, TypeError), match=r"the input has shape|input has dtype"):
            layer.get_output_for(first)
    layer.get_output_for(np.ones((2, 5)), deterministic=True)
    for shape in ((2, 5, 3), (2, 4)):
        with pytest.raises(
            ValueError, match=rf"the input has shape {re.escape(str(shape))}; this layer is for \(None, 5\)"
        ):
            layer.get_output_for(np.ones(shape))
    with pytest.raises(TypeError, match="input has dtype int64"):
        layer.get_output_for(np.ones((2, 5), int))
    for foreign in (torch.ones(2, 5), jnp.ones((2, 5))):
        with pytest.raises(TypeError, match=r"mean is a numpy\.ndarray, but input is a .*; convert mean"):
            layer.get_output_for(foreign)
    with pytest.raises(ValueError, match=r"gamma has shape \(1, 5\), but the new value \(5,\)"):
        layer.gamma.set_value(np.ones(5))
    values = {shared.name: shared.get_value() for shared in layer.params} | {"gamma": np.ones(5)}
    with pytest.raises(ValueError, match=r"gamma has shape \(5,\); it must be \(1, 5\), as input has shape \(2, 5\)"):
        layer.apply(values, np.ones((2, 5)))
    assert not layer.mean.get_value().any()


def test_names_and_arguments_of_lasagne():
    """A layer keeps its name, and accepts keyword arguments for other layers of a network."""
    layer, x = BatchNormLayer((None, 2), name="norm"), np.array([[1.0, 10.0], [3.0, 30.0]])
    assert (layer.name, BatchNormLayer((None, 2)).name) == ("norm", None)
    y = layer.get_output_for(x, deterministic=True, batch_norm_update_averages=True)
    np.testing.assert_allclose(y, x / 1.01, rtol=1e-15)
    np.testing.assert_array_equal(layer.mean.get_value(), [[0, 0]])


def test_shape_and_epsilon_may_change():
    """Sizes of reduced axes are free; epsilon and alpha are read at each call."""
    layer, x = BatchNormLayer((2, 3, None)), np.random.default_rng(2).normal(size=(4, 3, 9))
    assert layer.get_output_shape_for((4, 3, 9)) == (4, 3, 9)
    assert BatchNormLayer(layer).output_shape == (2, 3, None)
    layer.epsilon, layer.alpha = 1.0, 1.0
    y, mean, std = layer.get_output_for(x), x.mean(axis=(0, 2), keepdims=True), x.std(axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / (std + 1.0), rtol=1e-10)
    np.testing.assert_allclose(layer.std.get_value(), std, rtol=1e-12)
    twin = copy.deepcopy(layer)
    twin.get_output_for(x + 100)
    np.testing.assert_allclose(layer.mean.get_value(), mean, rtol=1e-10)
    assert [shared.name for shared in twin.get_params(trainable=True)] == ["beta", "gamma"]
    np.testing.assert_array_equal(np.asarray(twin.std), twin.std.get_value())


@pytest.mark.parametrize("library", [LIBRARIES[name] for name in ("numpy", "torch", "jax")], ids=by_name)
@pytest.mark.parametrize(("name", "value"), [
    ("linear", lambda z: z),
    ("rectify", lambda z: np.maximum(z, 0)),
    ("leaky_rectify", lambda z: np.where(z > 0, z, z / 100)),
    ("sigmoid", lambda z: 1 / (1 + np.exp(-z))),
    ("identity", lambda z: z),
    ("tanh", np.tanh),
    (lambda z: z * z, lambda z: z * z),
    (Unhashable(), lambda z: z + 5),
])  # fmt: skip
def test_nonlinearities(library, name, value):
    x = np.random.default_rng(3).normal(size=(5, 2))
    y = BatchNormLayer(x.shape, nonlinearity=name).get_output_for(library.array(x, "float32"))
    z = (x - x.mean(axis=0)) / (x.std(axis=0) + 0.01)
    np.testing.assert_allclose(library.numpy(y), value(z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", [LIBRARIES[name] for name in ("numpy", "torch", "jax")], ids=by_name)
def test_a_batch_that_is_not_finite(library):
    """The averages skip the batch; with `faithful=True` those of the affected channel stay NaN."""
    bad, good = (library.array(x, "float32") for x in ([[np.nan, 1.0], [1.0, 3.0]], [[1.0, 2.0], [3.0, 6.0]]))
    layer, faithful = BatchNormLayer((None, 2)), BatchNormLayer((None, 2), faithful=True)
    with pytest.warns(RuntimeWarning, match="did not enter the running statistics; faithful=True averages") as caught:
        layer.get_output_for(bad)
    assert [warning.filename for warning in caught] == [__file__]
    y = library.numpy(faithful.get_output_for(bad))
    np.testing.assert_allclose(y, [[np.nan, -1 / 1.01], [np.nan, 1 / 1.01]], rtol=1e-6)
    for one in (layer, faithful):
        one.get_output_for(good)
    np.testing.assert_allclose(layer.mean.get_value(), [[1, 2]], rtol=1e-6)
    np.testing.assert_allclose(layer.std.get_value(), [[1, 1.5]], rtol=1e-6)
    np.testing.assert_allclose(faithful.mean.get_value(), [[np.nan, 2.5]], rtol=1e-6)
    np.testing.assert_allclose(faithful.std.get_value(), [[np.nan, 1.5]], rtol=1e-6)


@pytest.mark.parametrize("library", [LIBRARIES[name] for name in ("numpy", "torch", "jax")], ids=by_name)
def test_faithful_half_precision_does_not_overflow(library):
    """The squares of deviations of 1000 are no float16; the formula is computed in float32."""
    layer = BatchNormLayer((None, 1), epsilon=0, faithful=True)
    y = layer.get_output_for(library.array([[1000.0], [3000.0]], "float16"))
    assert (str(y.dtype).rpartition(".")[2], str(layer.std.value.dtype).rpartition(".")[2]) == ("float16", "float32")
    np.testing.assert_allclose(library.numpy(y), [[-1], [1]], rtol=1e-3)
    np.testing.assert_allclose(layer.std.get_value(), [[500.5]], rtol=1e-6)


@pytest.mark.parametrize("faithful", [False, True])
def test_nonlinearity_is_called_once(faithful):
    """A Dropout draws once for each call."""
    calls, x = [], torch.ones(4, 2)
    layer = BatchNormLayer((None, 2), nonlinearity=lambda z: calls.append(z) or torch.nn.functional.dropout(z),
                           faithful=faithful)  # fmt: skip
    torch.manual_seed(0)
    layer.get_output_for(x)
    ours = torch.rand(1)
    torch.manual_seed(0)
    torch.nn.functional.dropout(x)
    assert (len(calls), ours.item()) == (1, torch.rand(1).item())


@pytest.mark.parametrize("library", [LIBRARIES[name] for name in ("numpy", "torch", "jax")], ids=by_name)
def test_values_are_copies(library):
    """`get_value` copies, like Theano's without `borrow`: copy and layer can then be changed independently."""
    layer, x = BatchNormLayer((None, 2)), library.array([[1.0, 10.0], [3.0, 30.0]], "float32")
    layer.get_output_for(x)
    before = {shared.name: shared.get_value() for shared in layer.params}
    expected = {name: library.numpy(value).copy() for name, value in before.items()}
    for shared in layer.params:
        shared.set_value(np.full((1, 2), 7.0), borrow=True)
        assert shared.get_value(borrow=True) is shared.value
    for name, value in before.items():
        assert not getattr(value, "requires_grad", False)
        np.testing.assert_array_equal(library.numpy(value), expected[name], name)
    if library.name != "jax":
        layer.gamma.get_value()[...] = 0
    np.testing.assert_array_equal(np.asarray(layer.gamma), [[7, 7]])
    layer.gamma.set_value(before["gamma"])  # as after early stopping
    np.testing.assert_array_equal(np.asarray(layer.gamma), [[1, 1]])


@pytest.mark.parametrize("own", ["numpy", "torch", "jax"])
def test_values_of_other_libraries_are_taken(own):
    layer = BatchNormLayer((None, 2))
    layer.get_output_for(LIBRARIES[own].array(np.ones((3, 2)), "float32"))
    kind = type(layer.gamma.value)
    for value in (
        np.full((1, 2), 2.0), [[2, 2]], jnp.full((1, 2), 2.0), torch.full((1, 2), 2.0, requires_grad=True),
        torch.full((1, 2), 2.0, dtype=torch.bfloat16),
    ):  # fmt: skip
        layer.gamma.set_value(np.ones((1, 2)))
        layer.gamma.set_value(value)
        np.testing.assert_array_equal(np.asarray(layer.gamma), [[2, 2]])
        assert type(layer.gamma.value) is kind
    with pytest.raises(RuntimeError, match="gamma cannot be updated in a function that is being traced"):
        jax.jit(lambda value: layer.gamma.set_value(value))(jnp.ones((1, 2)))


def test_torch_trains_the_leaves():
    """Gradients reach input, gamma and beta; the averages stay outside the graph; optimizers keep their tensors."""
    layer, x = BatchNormLayer((None, 3)), torch.randn(8, 3, generator=torch.manual_seed(0), requires_grad=True)
    layer.get_output_for(x, deterministic=True)
    gamma, beta = layer.gamma.value, layer.beta.value
    assert (gamma.is_leaf, gamma.requires_grad, layer.mean.value.requires_grad) == (True, True, False)
    optimizer = torch.optim.SGD([shared.value for shared in layer.get_params(trainable=True)], lr=0.5)
    (layer.get_output_for(x) ** 3).sum().backward()
    xhat = (x - x.mean(0)) / (x.std(0, correction=0) + 0.01)
    torch.testing.assert_close(beta.grad, 3 * (xhat**2).sum(0, keepdim=True))
    torch.testing.assert_close(gamma.grad, 3 * (xhat**3).sum(0, keepdim=True))
    assert x.grad.abs().max() > 0
    assert layer.mean.value.grad_fn is None
    optimizer.step()
    torch.testing.assert_close(layer.beta.get_value(), -1.5 * (xhat**2).sum(0, keepdim=True))
    layer.gamma.set_value([[1.0, 2.0, 3.0]])
    layer.beta.set_value(torch.zeros(1, 3, requires_grad=True))
    assert layer.gamma.get_value(borrow=True) is layer.gamma.value is gamma
    assert gamma.tolist() == [[1.0, 2.0, 3.0]]
    assert beta.tolist() == [[0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(np.asarray(layer.gamma), [[1, 2, 3]])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_torch_counts_a_checkpointed_batch_once(use_reentrant):
    layer, x = BatchNormLayer((None, 3)), torch.randn(8, 3, generator=torch.manual_seed(1), requires_grad=True)
    checkpoint(lambda x: layer.get_output_for(x).exp(), x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(layer.mean.get_value(), 0.5 * x.detach().mean(0, keepdim=True))


def test_torch_transformations_and_inference_mode():
    layer, x = BatchNormLayer((None, 3)), torch.randn(2, 4, 3, generator=torch.manual_seed(2))
    with torch.inference_mode():
        layer.get_output_for(x[0], deterministic=True)
    layer.get_output_for(x[0]).sum().backward()
    mean = layer.mean.value
    with pytest.raises(RuntimeError, match=r"mean cannot be updated .* use y, values = layer\.apply\(values, input\)"):
        torch.func.vmap(layer.get_output_for)(x)
    assert layer.mean.value is mean
    values = {shared.name: shared.get_value() for shared in layer.params}
    y, after = torch.func.vmap(lambda x: layer.apply(values, x))(x)
    for one, mean, batch in zip(y, after["mean"], x, strict=True):
        torch.testing.assert_close(one, layer.apply(values, batch)[0])
        torch.testing.assert_close(mean, 0.5 * values["mean"] + 0.5 * batch.mean(0, keepdim=True))


def test_jax_stores_numbers_alone():
    """Under `grad` the averages get concrete values; under `jit` an update is refused, and inference is not."""
    layer, x = BatchNormLayer((None, 3)), jax.random.normal(jax.random.key(0), (8, 3))
    evaluated = jax.jit(lambda x: layer.get_output_for(x, deterministic=True))(x)
    np.testing.assert_allclose(evaluated, x / 1.01, rtol=1e-6)
    with pytest.raises(RuntimeError, match=r"mean cannot be updated .* use y, values = layer\.apply\(values, input\)"):
        jax.jit(layer.get_output_for)(x)
    np.testing.assert_array_equal(layer.mean.get_value(), np.zeros((1, 3)))
    dx = jax.grad(lambda x: (layer.get_output_for(x) ** 3).sum())(x)
    np.testing.assert_allclose(layer.mean.get_value(), 0.5 * x.mean(axis=0, keepdims=True), rtol=1e-5)
    assert np.abs(dx).max() > 0


def test_jax_trains_by_apply():
    """`jax.jit`, `jax.grad` and `jax.lax.scan` through the pure function, which equals the layer's own call."""
    layer, xs = BatchNormLayer((None, 3)), jax.random.normal(jax.random.key(1), (4, 8, 3))
    layer.get_output_for(xs[0], deterministic=True)
    start = {shared.name: shared.get_value() for shared in layer.params}

    @jax.jit
    def run(values):
        return jax.lax.scan(lambda values, x: layer.apply(values, x)[::-1], values, xs)

    after, ys = run(start)
    for x, y in zip(xs, ys, strict=True):
        np.testing.assert_allclose(layer.get_output_for(x), y, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.mean.get_value(), after["mean"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(layer.std.get_value(), after["std"], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda values: (layer.apply(values, xs[0])[0] ** 3).sum()))(start)
    xhat = (xs[0] - xs[0].mean(axis=0)) / (xs[0].std(axis=0) + 0.01)
    np.testing.assert_allclose(gradient["gamma"], 3 * (xhat**3).sum(axis=0, keepdims=True), rtol=1e-3)
    assert start["mean"] is not after["mean"]
    assert jnp.array_equal(start["mean"], jnp.zeros((1, 3)))


@pytest.mark.parametrize(("module", "allowed"), [("lasagne", set()), ("returnn", {"xarray"})])
def test_imports_no_framework(module, allowed):
    code = f"import batchnorm.compat.{module}, sys; print(*{{'torch', 'jax', 'flax', 'xarray'}} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(loaded.split()) == allowed
