"""The options that the layers add, and their handling of Flax's: numbers, axes, conventions, signatures."""

import inspect
import statistics
import time
from dataclasses import replace
from fractions import Fraction

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import batchnorm as bn
import batchnorm.flax
import batchnorm.jax as bnj
from batchnorm.flax import linen, nnx

X = jnp.asarray(np.random.default_rng(23).normal(1, 2, (6, 5, 3)), jnp.float32)
KINDS = ("linen", "nnx")


def steps_of(kind, batches, *, evaluated=None, features=3, **options):
    """The results of a layer of ours on batches in training, its variables after them, and y in evaluation."""
    if kind == "nnx":
        layer = nnx.BatchNorm(features, rngs=flax.nnx.Rngs(0), **options)
        results = [layer(x) for x in batches]
        state = {name: value[...] for name, value in flax.nnx.state(layer, flax.nnx.BatchStat).items()}
        return results, state, None if evaluated is None else layer(evaluated, use_running_average=True)
    layer = linen.BatchNorm(**options)
    variables, results = layer.init(jax.random.key(0), batches[0], use_running_average=False), []
    for x in batches:
        y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **updated}
        results.append(y)
    y = None if evaluated is None else layer.apply(variables, evaluated, use_running_average=True)
    return results, variables["batch_stats"], y


def batches_of(rng, number):
    return [jnp.asarray(rng.normal(1, 2, (6, 5, 3)), jnp.float32) for _ in range(number)]


# ---- initialization, axes and signatures ----------------------------------------------------------------------------


def test_initialization_needs_no_named_axis(rng):
    """The axis of the groups does not exist yet; once it does, the layer normalizes within them."""
    layer = linen.BatchNorm(
        axis_name="i", axis_index_groups=[[0, 1], [2, 3]], use_running_average=False, momentum=0.0
    )  # fmt: skip
    variables = layer.init(jax.random.key(0), X)
    parts = jnp.asarray(rng.normal(1, 2, (4, 5, 3)), jnp.float32)
    y, state = jax.pmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="i")(parts)
    for group in (slice(0, 2), slice(2, 4)):
        expected = parts[group].mean((0, 1))
        np.testing.assert_allclose(state["batch_stats"]["mean"][group], [expected, expected], rtol=1e-5)
        np.testing.assert_allclose(y[group].mean((0, 1)), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "axes"),
    [([1, 2], (1, 2)), (range(1, 3), (1, 2)), (np.int64(2), 2), ((-1, 1), (1, 2)), (np.arange(1, 2), 1)],
)
def test_axes_as_any_sequence(axis, axes):
    _, ours, _ = steps_of("linen", [X], axis=axis)
    _, expected, _ = steps_of("linen", [X], axis=axes)
    np.testing.assert_array_equal(ours["var"], expected["var"])
    reduced = tuple(i for i in range(3) if i not in np.atleast_1d(axes))
    np.testing.assert_allclose(ours["mean"], 0.01 * X.mean(reduced), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("axis", [np.int64(-1), [2], range(2, 3)])
def test_axes_of_nnx(axis):
    _, ours, _ = steps_of("nnx", [X], axis=axis)
    np.testing.assert_allclose(ours["mean"], 0.01 * X.mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_axes_that_are_none(kind):
    """Flax accepts axis -4 of three, and reduces over all of them."""
    assert flax.nnx.BatchNorm(3, axis=-4, rngs=flax.nnx.Rngs(0))(X).shape == X.shape
    with pytest.raises(ValueError, match="axis -4 is out of range for x with 3 dimensions"):
        steps_of(kind, [X], axis=-4)
    for axis in ("1", 1.0, True):
        with pytest.raises(TypeError, match=f"axis is {axis!r}; it must be an integer or a sequence of integers"):
            steps_of(kind, [X], axis=axis)


def test_features_of_several_axes_in_nnx():
    """A tuple, by ascending axis: variables, initializers and results are those of linen."""
    initializers = {"scale_init": jax.nn.initializers.normal(), "bias_init": jax.nn.initializers.ones}
    layer = nnx.BatchNorm((5, 3), axis=(-1, 1), momentum=0.5, rngs=flax.nnx.Rngs(0), **initializers)
    assert layer.num_features == (5, 3)
    assert layer.scale.shape == layer.bias.shape == layer.mean.shape == layer.var.shape == (5, 3)
    assert len(np.unique(layer.scale[...])) == 15
    y = layer(X)
    xhat = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    np.testing.assert_allclose(y, layer.scale[...] * xhat + 1, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], 0.5 * X.mean(0), rtol=1e-5)
    plain = nnx.BatchNorm((5, 3), axis=(1, 2), use_scale=False, convention="lasagne-gist", rngs=flax.nnx.Rngs(0))
    assert plain.scale is None
    assert (plain.bias.shape, plain.std.shape) == ((5, 3), (5, 3))
    with pytest.raises(
        ValueError, match=r"scale has shape \(3, 5\), but .* along axis \(1, 2\); .*num_features=\(5, 3\)"
    ):
        nnx.BatchNorm((3, 5), axis=(1, 2), rngs=flax.nnx.Rngs(0))(X)


def test_other_channels_than_those_of_x():
    """The message has Flax's name of the variable and the fix; Flax broadcasts, or fails within a formula."""
    channels = r"x with shape \(6, 4\) has channels \(4,\) along axis 1; "
    for options, name in (({}, "scale"), ({"use_scale": False, "use_bias": False}, "mean")):
        layer = nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **options)
        for training in (True, False):
            with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), but {channels}.* with num_features=4, or"):
                layer(jnp.ones((6, 4)), use_running_average=not training)
    one = {"mean": jnp.ones(1), "var": jnp.ones(1)}
    assert flax.linen.BatchNorm(use_bias=False, use_scale=False).apply({"batch_stats": one}, X, True).shape == X.shape
    with pytest.raises(
        ValueError, match=r"mean has shape \(1,\), but .*; pass variables made for such an x, or the axis"
    ):
        linen.BatchNorm(use_bias=False, use_scale=False).apply({"batch_stats": one}, X, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scalar_is_refused(kind):
    with pytest.raises(ValueError, match="x is a scalar; batch normalization needs at least one dimension"):
        steps_of(kind, [1.0], features=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mask", "residual"])
def test_arguments_that_are_no_numbers(kind, name, rng):
    """They are refused before compilation; lists of numbers are accepted."""
    for value, message in (
        ("abc", f"{name} is a str of strings; it must"),
        ([[1.0], [2.0, 3.0]], f"{name} is a list whose parts differ in shape; it must"),
        ({"a": 1}, f"{name} is a dict of objects; it must"),
    ):
        with pytest.raises(TypeError, match=message):
            called(kind, {}, **{name: value})
    value = np.asarray(rng.integers(0, 2, X.shape), np.float32)
    for given in (value.tolist(), value.astype(jnp.bfloat16), value.astype(int)):
        y, expected = (called(kind, {}, **{name: one}) for one in (given, jnp.asarray(value)))
        np.testing.assert_array_equal(y, expected)


def test_signature_of_nnx():
    """Flax's options of the installed version with their defaults, then ours; a subclass shows its own."""
    theirs = inspect.signature(flax.nnx.BatchNorm.__init__).parameters
    ours = inspect.signature(nnx.BatchNorm).parameters
    assert list(ours) == [*list(theirs)[1:], "activation", "convention", "kernel", "count_skipped"]
    assert all(ours[name] == theirs[name] for name in list(theirs)[1:])
    assert ours["convention"].default == "flax"

    class Narrow(nnx.BatchNorm):
        def __init__(self, width: int) -> None:
            super().__init__(width, rngs=flax.nnx.Rngs(0))

    assert list(inspect.signature(Narrow).parameters) == ["width"]
    assert Narrow(3)(X).shape == X.shape
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        nnx.BatchNorm(3, momentun=0.9, rngs=flax.nnx.Rngs(0))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("activation", "rleu", r"no activation is called 'rleu'; did you mean 'relu'\? Known are identity, relu"),
        ("activation", "nonsense", "no activation is called 'nonsense'; known are identity, relu"),
        ("convention", "kears", "no convention is called 'kears'; did you mean 'keras'"),
        ("kernel", "nativ", "no kernel is called 'nativ'; known are native, agnostic"),
    ],
)
def test_names_are_checked_by_the_constructors(option, value, message):
    with pytest.raises(ValueError, match=message):
        linen.BatchNorm(**{option: value})
    with pytest.raises(ValueError, match=message):
        nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **{option: value})


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [np.float32, np.asarray, jnp.asarray, Fraction])
def test_momentum_and_epsilon_as_arrays(kind, number, rng):
    batches = batches_of(rng, 3)
    ours, state, y = steps_of(kind, batches, momentum=number(0.75), epsilon=number(0.125), evaluated=X)
    expected, statistics_of_floats, evaluated = steps_of(kind, batches, momentum=0.75, epsilon=0.125, evaluated=X)
    np.testing.assert_allclose(ours[-1], expected[-1], atol=2e-6)
    np.testing.assert_allclose(y, evaluated, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), state, statistics_of_floats)
    assert state["mean"].dtype == jnp.float32


OUT_OF_RANGE = [
    (
        "momentum",
        1.5,
        ValueError,
        "momentum is 1.5; it is the weight of the old running statistics and must lie in 0 to 1",
    ),
    ("momentum", jnp.float32(-0.5), ValueError, r"momentum is Array\(-0.5.*must lie in 0 to 1"),
    ("momentum", float("nan"), ValueError, "momentum is nan"),
    ("momentum", True, TypeError, r"momentum is True \(bool\); .*pass a number"),
    ("momentum", "0.9", TypeError, r"momentum is '0.9' \(str\); .*pass a number"),
    ("momentum", jnp.full(3, 0.5), TypeError, r"momentum is an array of shape \(3,\).*pass a number or a scalar array"),
    ("momentum", jnp.asarray(True), TypeError, "momentum is an array of shape .* dtype bool"),
    ("epsilon", -0.001, ValueError, "epsilon is -0.001; it must be finite and >= 0"),
    ("epsilon", np.float32("inf"), ValueError, "epsilon is .*inf.*; it must be finite"),
    ("epsilon", jnp.full(3, 0.5), TypeError, r"epsilon is an array of shape \(3,\).*pass a number or a scalar array"),
]


@pytest.mark.parametrize(("option", "value", "error", "message"), OUT_OF_RANGE, ids=str)
def test_numbers_out_of_range(option, value, error, message):
    """Our constructors refuse them. Flax's accept most of them; a replaced layer refuses them at its first call."""
    for make in (linen.BatchNorm, lambda **options: nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **options)):
        with pytest.raises(error, match=message):
            make(**{option: value})
    with pytest.raises(error, match=message), batchnorm.flax.replaced():
        flax.linen.BatchNorm(use_running_average=False, **{option: value}).init(jax.random.key(0), X)


@pytest.mark.parametrize(
    ("option", "value"),
    [("momentum", 1.5), ("momentum", True), ("epsilon", -0.001), ("momentum", jnp.asarray([0.5, 0.25, 0.0]))],
    ids=str,
)
def test_numbers_that_flax_takes(option, value):
    """Flax computes something for each: a running mean that diverges, a momentum for each channel, ..."""
    theirs = flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **{option: value})
    theirs(X)
    momentum = value if option == "momentum" else 0.99
    np.testing.assert_allclose(theirs.mean[...], (1 - momentum) * X.mean((0, 1)), rtol=1e-4)
    before = theirs.mean[...]
    with pytest.raises((ValueError, TypeError), match=f"{option} is "):
        batchnorm.flax.replace(theirs)(X)
    np.testing.assert_array_equal(theirs.mean[...], before)


def test_an_epsilon_of_0_in_a_convention_that_refuses_it():
    for epsilon in (0.0, jnp.float32(0)):
        layer = nnx.BatchNorm(3, convention="pytorch", axis=-1, epsilon=epsilon, rngs=flax.nnx.Rngs(0))
        with pytest.raises(ValueError, match="epsilon must be positive in training, but is 0: pytorch refuses it"):
            layer(X)
        np.testing.assert_allclose(layer(X, use_running_average=True), X, rtol=1e-6)


def test_a_sweep_over_momentum_and_epsilon():
    """Both traced by vmap, in linen and in nnx, against Flax's layers."""

    def swept(of_linen, of_nnx, momentum, epsilon):
        layer = of_linen(momentum=momentum, epsilon=epsilon, use_running_average=False)
        variables = {
            "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
            "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
        }
        y, state = layer.apply(variables, X, mutable=["batch_stats"])
        other = of_nnx(3, momentum=momentum, epsilon=epsilon, rngs=flax.nnx.Rngs(0))
        return y, state["batch_stats"]["var"], other(X), other.var[...]

    momenta, epsilons = jnp.asarray([0.0, 0.5, 0.9]), jnp.asarray([1e-5, 0.1, 1.0])
    results = [
        jax.jit(jax.vmap(lambda m, e, of=kinds: swept(*of, m, e)))(momenta, epsilons)
        for kinds in ((linen.BatchNorm, nnx.BatchNorm), (flax.linen.BatchNorm, flax.nnx.BatchNorm))
    ]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.ptp(results[0][1], axis=0).min() > 0.5


def test_a_schedule_of_the_momentum(rng):
    """momentum as a function of the step, in one compiled function: the cumulative average."""
    batches = batches_of(rng, 4)

    @jax.jit
    def step(state, x, number):
        layer = linen.BatchNorm(momentum=number / (number + 1), use_running_average=False)
        variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "batch_stats": state}
        return layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    state = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    for number, x in enumerate(batches):
        state = step(state, x, jnp.float32(number))
    np.testing.assert_allclose(state["mean"], np.mean([x.mean((0, 1)) for x in batches], 0), rtol=1e-5)
    np.testing.assert_allclose(state["var"], np.mean([x.var((0, 1)) for x in batches], 0), rtol=1e-5)


# ---- conventions ----------------------------------------------------------------------------------------------------

EXTRA = {
    "debiased": replace(bn.CONVENTIONS["flax"], name="debiased", debias="adam", decay=0.5),
    "weighted": replace(bn.CONVENTIONS["flax"], name="weighted", debias="weight_sum", decay=0.5),
    "copied": replace(bn.CONVENTIONS["flax"], name="copied", debias="first_batch", decay=0.5),
    "cumulative": replace(bn.CONVENTIONS["pytorch"], name="cumulative", decay=None),
    "logarithmic": replace(bn.CONVENTIONS["flax"], name="logarithmic", tracked="log10_std", initial_spread=0.0),
    "always": replace(bn.CONVENTIONS["flax"], name="always", update="always"),
}
VARIABLES = {
    "zygote-gist": {"mean", "std_eps"},
    "lasagne-gist": {"mean", "std"},
    "debiased": {"mean", "var", "weight"},
    "weighted": {"mean", "var", "weight"},
    "copied": {"mean", "var", "steps"},
    "cumulative": {"mean", "var", "steps"},
    "logarithmic": {"mean", "log10_std"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*bn.CONVENTIONS, *EXTRA])
def test_every_convention(kind, name, rng):
    """The layers compute and store the same as the function, with the convention's own momentum and epsilon."""
    convention = EXTRA.get(name, name)
    batches = batches_of(rng, 3)
    if name == "always" and kind == "linen":
        ours, state, y = *steps_of(kind, batches, convention=convention, axis=-1)[:2], None
    else:
        ours, state, y = steps_of(kind, batches, convention=convention, axis=-1, evaluated=X)
    running = bn.RunningStatistics.initial(3, convention, like=X)
    for result, x in zip(ours, batches, strict=True):
        expected, running = bnj.batch_norm(
            x, jnp.ones(3), jnp.zeros(3), running, training=True, axis=-1, convention=convention
        )
        np.testing.assert_allclose(result, expected, atol=2e-6)
    assert set(state) == VARIABLES.get(name, {"mean", "var"})
    fields = {"mean": "mean", "steps": "steps", "weight": "weight"}
    for variable, value in state.items():
        np.testing.assert_allclose(value, getattr(running, fields.get(variable, "spread")), rtol=1e-6, atol=1e-7)
    if y is not None:
        expected, _ = bnj.batch_norm(
            X, jnp.ones(3), jnp.zeros(3), running, training=False, axis=-1, convention=convention
        )
        np.testing.assert_allclose(y, expected, atol=2e-6)


def test_an_update_in_evaluation_needs_a_mutable_state():
    layer = linen.BatchNorm(convention=EXTRA["always"], use_running_average=True)
    variables = layer.init(jax.random.key(0), X)
    assert not variables["batch_stats"]["mean"].any()
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables, X)
    _, state = layer.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.01 * X.mean((0, 1)), rtol=1e-5)


def test_attributes_are_numbers():
    """Attributes hold Flax's defaults, or the convention's, for code that inspects them; explicit numbers are kept."""
    for layer in (linen.BatchNorm(), nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))):
        assert (layer.momentum, layer.epsilon, layer.axis) == (0.99, 1e-5, -1)
    for options, expected in (({}, (0.99, 1e-3)), ({"momentum": 0.5}, (0.5, 1e-3)), ({"epsilon": 0.0}, (0.99, 0.0))):
        layer = linen.BatchNorm(convention="keras", **options)
        other = nnx.BatchNorm(3, convention="keras", rngs=flax.nnx.Rngs(0), **options)
        assert (layer.momentum, layer.epsilon) == (other.momentum, other.epsilon) == expected
        assert layer.axis == other.axis == -1
    assert (
        linen.BatchNorm(convention="pytorch").axis
        == nnx.BatchNorm(3, convention="pytorch", rngs=flax.nnx.Rngs(0)).axis
        == 1
    )
    assert linen.BatchNorm(convention=EXTRA["cumulative"]).momentum is None


def test_one_element_in_a_convention_that_refuses_it():
    """Initialization, whose input may be a dummy, does not refuse it."""
    x = X[:1, 0]
    layer = linen.BatchNorm(convention="pytorch", use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="one element per channel"):
        layer.apply(variables, x, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="one element per channel"):
        nnx.BatchNorm(3, convention="pytorch", rngs=flax.nnx.Rngs(0))(x)


@pytest.mark.parametrize("kind", KINDS)
def test_checks_of_values_hold_in_eager_calls(kind):
    """Eager calls are compiled, which hides values, unless a check depends on them."""
    mask = jnp.asarray([[True, False, False, False, False]] + [[False] * 5] * 5)[..., None]
    with pytest.raises(ValueError, match="one element per channel after masking"):
        called(kind, {"convention": "pytorch", "axis": -1}, mask=mask)
    with pytest.raises(ValueError, match="each must lie in 0 to 5"):
        called(kind, {}, lengths=jnp.asarray([1, 2, 3, 4, 5, 6]))


def called(kind, options, **arguments):
    if kind == "nnx":
        return nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **options)(X, **arguments)
    layer = linen.BatchNorm(use_running_average=False, **options)
    return layer.apply(layer.init(jax.random.key(0), X), X, mutable=["batch_stats"], **arguments)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_callable_activation_sees_its_variables(kind):
    """It is not compiled and cached, because a variable that it refers to changes between calls."""
    slope = [jnp.float32(0.5)]

    def leaky(z):
        return jnp.where(z > 0, z, slope[0] * z)

    options = {"activation": leaky}
    first = called(kind, options)
    slope[0] = jnp.float32(0.25)
    np.testing.assert_allclose(jnp.where(first < 0, first / 2, first), called(kind, options), rtol=1e-6)


def test_eager_calls_on_an_array_that_lies_on_several_devices():
    """Statistics are those of the whole batch; y has the sharding of x."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x = jnp.concatenate([X, X[:2] + 5])
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    layers = [nnx.BatchNorm(3, momentum=0.5, rngs=flax.nnx.Rngs(0)) for _ in range(2)]
    sharded, expected = layers[0](jax.device_put(x, sharding)), layers[1](x)
    np.testing.assert_allclose(sharded, expected, atol=2e-6)
    np.testing.assert_allclose(layers[0].var[...], layers[1].var[...], rtol=1e-6)
    assert sharded.sharding.is_equivalent_to(sharding, 3)


# ---- kernels and skipped batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_chosen_by_name(kind):
    def text(kernel):
        return str(jax.make_jaxpr(lambda: called(kind, {"kernel": kernel}))())

    assert "batchnorm_forward" in text(None)
    assert "batchnorm_forward" in text("native")
    assert "batchnorm_forward" not in text("agnostic")
    np.testing.assert_allclose(called(kind, {"kernel": "agnostic"}), called(kind, {"kernel": "native"}), atol=2e-6)
    with pytest.raises(ValueError, match="kernel 'native' does not serve this call: a callable activation"):
        called(kind, {"kernel": "native", "activation": jnp.tanh})


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_batches_are_counted(kind):
    bad = X.at[0, 0, 0].set(jnp.inf)
    with pytest.warns(RuntimeWarning, match="not finite"):
        _, state, _ = steps_of(kind, [X, bad, X, bad], count_skipped=True)
    assert set(state) == {"mean", "var", "skipped"}
    assert state["skipped"].dtype == jnp.float32
    assert float(state["skipped"]) == 2
    _, expected, _ = steps_of(kind, [X, X])
    np.testing.assert_array_equal(state["mean"], expected["mean"])


# ---- tools ----------------------------------------------------------------------------------------------------------


def operations(monkeypatch, kind):
    """The numbers of operations in the table of a network with one layer: forward, and with the gradients."""
    rows = []
    original = flax.linen.summary._get_call_flops

    def record(*arguments):
        rows.append(original(*arguments))
        return rows[-1]

    monkeypatch.setattr(flax.linen.summary, "_get_call_flops", record)
    network = flax.linen.Sequential([flax.linen.Dense(16, use_bias=False), kind(use_running_average=False)])
    table = flax.linen.tabulate(network, jax.random.key(0), compute_flops=True, compute_vjp_flops=True)
    assert "flops" in table(jnp.ones((8, 16)))
    monkeypatch.undo()
    return rows


def test_operations_are_counted(monkeypatch):
    """XLA counts none in C++ calls; counts are within a factor of 2 of Flax's, in the layer's row and its parent's."""
    theirs, ours = (operations(monkeypatch, kind) for kind in (flax.linen.BatchNorm, linen.BatchNorm))
    assert len(theirs) == len(ours) == 3
    for expected, counted in zip(np.ravel(theirs), np.ravel(ours), strict=True):
        assert expected / 2 <= counted <= expected * 2
    assert "batchnorm_forward" in str(jax.make_jaxpr(lambda: called("linen", {}))())


def test_eager_calls_are_no_slower(rng):
    """On a small array, whose time is that of Python and dispatch: ours takes about 0.4 of Flax's."""
    x = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    layers = [kind(16, rngs=flax.nnx.Rngs(0)) for kind in (flax.nnx.BatchNorm, nnx.BatchNorm)]
    times = ([], [])
    for _ in range(60):
        for layer, taken in zip(layers, times, strict=True):
            begin = time.perf_counter()
            layer(x).block_until_ready()
            taken.append(time.perf_counter() - begin)
    theirs, ours = map(statistics.median, times)
    assert ours < theirs


@pytest.mark.parametrize("kernel", [None, "agnostic"])
def test_an_exported_training_step(kernel):
    """`jax.export` exports a step with a layer unchanged, and the exported program computes the same."""
    layer = linen.BatchNorm(use_running_average=False, kernel=kernel, activation="relu")
    variables = layer.init(jax.random.key(0), X)

    @jax.jit
    def step(variables, x):
        def loss(parameters):
            y, state = layer.apply({**variables, "params": parameters}, x, mutable=["batch_stats"])
            return jnp.sum(y**3), state

        return jax.grad(loss, has_aux=True)(variables["params"])

    exported = jax.export.export(step)(variables, X)
    results = exported.call(variables, X), step(variables, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), *results)
    assert "custom_call @batchnorm" not in exported.mlir_module()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_the_statistics(kind):
    """Of a loss of the updated statistics (DeepInversion), as Flax's layers: nnx has none from 0.12.1 on."""

    def loss(x, of_linen, of_nnx):
        if kind == "nnx":
            layer = of_nnx(3, momentum=0.5, rngs=flax.nnx.Rngs(0))
            layer(x)
            return jnp.sum(layer.mean[...] ** 2) + jnp.sum(layer.var[...] ** 3)
        variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}}
        variables["batch_stats"] = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
        layer = of_linen(momentum=0.5, use_running_average=False)
        state = layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
        return jnp.sum(state["mean"] ** 2) + jnp.sum(state["var"] ** 3)

    theirs = jax.grad(loss)(X, flax.linen.BatchNorm, flax.nnx.BatchNorm)
    ours = jax.grad(loss)(X, linen.BatchNorm, nnx.BatchNorm)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert bool(jnp.any(theirs)) == (kind == "linen" or not hasattr(flax.nnx.Variable, "set_value"))
