"""Insertion of batch norms after layers of Flax."""

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchnorm.flax import nnx, with_batch_norm

X = jnp.asarray(np.random.default_rng(37).normal(1, 2, (4, 6, 6, 3)), jnp.float32)
ONES = jax.nn.initializers.ones

LINEN = [
    lambda **o: flax.linen.Dense(5, **o),
    lambda **o: flax.linen.Conv(5, (3, 3), **o),
    lambda **o: flax.linen.ConvTranspose(5, (2, 2), **o),
]
NNX = [
    lambda **o: flax.nnx.Linear(3, 5, rngs=flax.nnx.Rngs(0), **o),
    lambda **o: flax.nnx.Conv(3, 5, (3, 3), rngs=flax.nnx.Rngs(0), **o),
    lambda **o: flax.nnx.ConvTranspose(3, 5, (2, 2), rngs=flax.nnx.Rngs(0), **o),
]


def normalized(z):
    axes = tuple(range(z.ndim - 1))
    return (z - z.mean(axes)) / jnp.sqrt(z.var(axes) + 1e-5)


@pytest.mark.parametrize("make", LINEN)
def test_layers_of_linen(make):
    """No bias in the layer, its initializer in the batch norm; training normalizes before the activation."""
    layer = with_batch_norm(make(bias_init=ONES), "relu")
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    assert set(variables["params"]["layers_0"]) == {"kernel"}
    np.testing.assert_array_equal(variables["params"]["norm"]["bias"], np.ones(5))
    without = make(use_bias=False).apply({"params": variables["params"]["layers_0"]}, X)
    y, state = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, jax.nn.relu(normalized(without) + 1), atol=2e-5)
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], 0.01 * without.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(
        layer.apply(variables, X, True), jax.nn.relu(without / jnp.sqrt(1 + 1e-5) + 1), atol=1e-5
    )


@pytest.mark.parametrize("make", NNX)
def test_layers_of_nnx(make):
    """The bias is the same Param, now of the batch norm; in evaluation, before any batch, the result is what it was."""
    layer = make(bias_init=ONES)
    before, bias = layer(X), layer.bias
    model = with_batch_norm(layer, jnp.tanh)
    assert model.layers[0] is layer
    assert layer.bias is None
    assert model.layers[1].bias is bias
    assert model.layers[1].activation == "tanh"
    model.eval()
    np.testing.assert_allclose(model(X), jnp.tanh(before), atol=1e-4)
    model.train()
    np.testing.assert_allclose(model(X), jnp.tanh(normalized(before) + 1), atol=2e-5)
    gradients = flax.nnx.grad(lambda model: jnp.sum(model(X) ** 3))(model)
    assert len(jax.tree.leaves(gradients)) == 3


@pytest.mark.parametrize("make", [LINEN[1], NNX[1]])
def test_a_layer_without_a_bias(make):
    layer = with_batch_norm(make(use_bias=False))
    if isinstance(layer, flax.linen.Module):
        variables = layer.init(jax.random.key(0), X, use_running_average=False)
        assert not variables["params"]["norm"]["bias"].any()
    else:
        assert not layer.layers[1].bias[...].any()


def test_a_trailing_activation_moves_behind():
    """A function that the kernels reproduce, derivatives included, becomes its name; others stay callables."""
    for function, expected in (
        (flax.linen.relu, "relu"), (flax.linen.silu, "silu"), (jax.nn.swish, "silu"), (jnp.tanh, "tanh"),
        (flax.linen.sigmoid, "sigmoid"), (flax.linen.gelu, flax.linen.gelu), (jax.nn.relu6, jax.nn.relu6),
    ):  # fmt: skip
        of_linen = with_batch_norm(flax.linen.Sequential([flax.linen.Dense(4), flax.linen.Dense(5), function]))
        assert of_linen.norm.activation == expected
        assert [layer.use_bias for layer in of_linen.layers] == [True, False]
        of_nnx = with_batch_norm(flax.nnx.Sequential(NNX[0](), function))
        assert of_nnx.layers[1].activation == expected
        np.testing.assert_allclose(of_nnx(X), function(normalized(of_nnx.layers[0](X))), atol=2e-5)


def test_the_dtypes_are_the_layers():
    layer = with_batch_norm(flax.linen.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    y, variables = layer.init_with_output(jax.random.key(0), X, use_running_average=False)
    assert y.dtype == variables["params"]["norm"]["scale"].dtype == jnp.bfloat16
    model = with_batch_norm(NNX[0](dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    assert model(X).dtype == model.layers[1].scale.dtype == jnp.bfloat16
    assert isinstance(model.layers[1], nnx.BatchNorm)


def test_the_call_takes_what_a_batch_norm_takes():
    layer = with_batch_norm(flax.linen.Dense(5), "relu")
    x = X[:, :, 0]
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    lengths, residual = jnp.asarray([6, 2, 3, 1]), jnp.ones((4, 6, 5))
    y, _ = layer.apply(variables, x, False, lengths=lengths, residual=residual, mutable=["batch_stats"])
    mask = (jnp.arange(6) < lengths[:, None])[..., None]
    z = x @ variables["params"]["layers_0"]["kernel"]
    mean, var = z.mean((0, 1), where=mask), z.var((0, 1), where=mask)
    np.testing.assert_allclose(y, jax.nn.relu((z - mean) / jnp.sqrt(var + 1e-5) + 1), atol=2e-5)


@pytest.mark.parametrize(
    "layer",
    [
        flax.linen.Embed(3, 4),
        flax.linen.Sequential([flax.linen.Dense(3), flax.linen.PReLU()]),
        flax.nnx.LayerNorm(3, rngs=flax.nnx.Rngs(0)),
        flax.linen.Sequential([]),
        3,
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_refused(layer):
    with pytest.raises(TypeError, match=r"cannot normalize the result of .*linen.Dense, .*nnx.ConvTranspose, or a Seq"):
        with_batch_norm(layer)


def test_two_activations_are_refused():
    with pytest.raises(ValueError, match="activation is 'tanh', but the layer ends in relu; leave out one of them"):
        with_batch_norm(flax.linen.Sequential([flax.linen.Dense(3), flax.linen.relu]), "tanh")
    layer = NNX[0]()
    with pytest.raises(ValueError, match="no activation is called 'rleu'"):
        with_batch_norm(layer, "rleu")
    assert layer.bias is not None


# ---- names and shared layers ----------------------------------------------------------------------------------------


class Compact(flax.linen.Module):
    """Blocks made within a module, of a layer with a name, of one without, and of a sequence."""

    @flax.linen.compact
    def __call__(self, x):
        x = with_batch_norm(flax.linen.Dense(5, name="fc"), "relu")(x, False)
        x = with_batch_norm(flax.linen.Dense(6))(x, False)
        x = with_batch_norm(flax.linen.Sequential([flax.linen.Dense(7), jnp.sin, flax.linen.Dense(8)]))(x, False)
        return flax.linen.Dense(9)(flax.linen.BatchNorm(use_running_average=False)(x))


class WithSetup(flax.linen.Module):
    def setup(self):
        self.named = with_batch_norm(flax.linen.Dense(5, name="fc"))
        self.own = flax.linen.Dense(6)
        self.block = with_batch_norm(self.own)

    def __call__(self, x):
        return self.block(self.named(x, False), False)


def shapes_of_kernels(variables):
    """The path of each kernel with its shape."""
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    paths = {"/".join(key.key for key in path): value.shape for path, value in leaves}
    return {path.removesuffix("/kernel"): shape for path, shape in paths.items() if path.endswith("kernel")}


def test_names_within_a_module():
    """The norm is within its block and takes no number of the module's own; a layer keeps the name it was given."""
    variables = Compact().init(jax.random.key(0), X)
    blocks = [f"SequentialWithBatchNorm_{i}" for i in range(3)]
    assert set(variables["batch_stats"]) == {*blocks, "BatchNorm_0"}
    assert shapes_of_kernels(variables) == {
        f"{blocks[0]}/fc": (3, 5), f"{blocks[1]}/layers_0": (5, 6), "Dense_1": (6, 7), f"{blocks[2]}/layers_2": (7, 8),
        "Dense_3": (8, 9),
    }  # fmt: skip
    assert [variables["params"][block]["norm"]["scale"].shape for block in blocks] == [(5,), (6,), (8,)]
    y, state = Compact().apply(variables, X, mutable=["batch_stats"])
    assert y.shape == (4, 6, 6, 9)
    assert all(state["batch_stats"][block]["norm"]["mean"].any() for block in blocks)
    variables = WithSetup().init(jax.random.key(0), X)
    assert shapes_of_kernels(variables) == {"named/fc": (3, 5), "block/own": (5, 6)}
    outside = with_batch_norm(flax.linen.Dense(5, name="fc"))
    assert set(outside.init(jax.random.key(0), X, False)["params"]) == {"fc", "norm"}


def test_a_layer_that_occurs_twice_is_refused():
    """Its first occurrence would lose its bias or, in linen, no longer share its parameters."""
    dense, linear = flax.linen.Dense(3), flax.nnx.Linear(3, 3, bias_init=ONES, rngs=flax.nnx.Rngs(0))
    for model in (
        flax.linen.Sequential([dense, jnp.sin, dense]),
        flax.linen.Sequential([flax.linen.Sequential([dense, jnp.sin]), dense, jnp.tanh]),
        flax.nnx.Sequential(linear, jnp.sin, linear),
        flax.nnx.Sequential(flax.nnx.Sequential(linear, jnp.sin), linear, jnp.tanh),
    ):
        with pytest.raises(ValueError, match=r"last layer of the Sequential, (Dense|Linear), occurs earlier in it"):
            with_batch_norm(model)
    assert linear.bias is not None
    shared = with_batch_norm(flax.linen.Sequential([dense, jnp.sin, dense, flax.linen.Dense(5)]))
    assert set(shared.init(jax.random.key(0), X, False)["params"]) == {"layers_0", "layers_3", "norm"}
    others = with_batch_norm(flax.nnx.Sequential(linear, jnp.sin, linear, NNX[0]()))
    assert others.layers[0] is others.layers[2] is linear
    assert linear.bias is not None
