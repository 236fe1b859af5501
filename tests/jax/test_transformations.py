"""Every transformation of JAX, by the kernels, against the generic implementation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.experimental.jet import jet

import batchnorm as bn
import batchnorm.jax as bnj
from batchnorm.flax import linen as flax_layers

X, DY = jnp.asarray(np.random.default_rng(5).normal(1, 2, (2, 8, 5, 3)), jnp.float32)
GAMMA, BETA = jnp.asarray(np.random.default_rng(6).uniform(0.5, 1.5, (2, 3)), jnp.float32)
RUNNING = bn.RunningStatistics.initial(3, "flax", like=X)


def loss(x, gamma, beta, kernel=None, **options):
    y, _ = bnj.batch_norm(x, gamma, beta, training=True, activation="gelu", kernel=kernel, **options)
    return jnp.sum(y * DY[: len(x)])


plain = partial(loss, kernel="agnostic")
ARGUMENTS = (X, GAMMA, BETA)
ALL = (0, 1, 2)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: partial(jax.grad(f, argnums=ALL)),
        lambda f: jax.value_and_grad(f, argnums=ALL),
        lambda f: lambda *a: jax.vjp(f, *a)[1](jnp.float32(2)),
        lambda f: lambda *a: jax.jvp(f, a, a),
        lambda f: lambda *a: jax.linearize(f, *a)[1](*a),
        lambda f: jax.jacfwd(f, argnums=ALL),
        lambda f: jax.hessian(f, argnums=(1, 2)),
        lambda f: jax.jacfwd(jax.grad(f, argnums=1)),
        lambda f: jax.grad(lambda *a: sum(jnp.sum(g**2) for g in jax.grad(f, argnums=ALL)(*a)), argnums=ALL),
        lambda f: jax.grad(lambda *a: jax.jvp(f, a, a)[1], argnums=ALL),
        lambda f: jax.grad(jax.checkpoint(f), argnums=ALL),
    ],
    ids=[
        "grad",
        "value_and_grad",
        "vjp",
        "jvp",
        "linearize",
        "jacfwd",
        "hessian",
        "mixed",
        "grad_of_grad",
        "grad_of_jvp",
        "remat",
    ],
)
def test_derivatives(transform):
    ours, theirs = (jax.jit(transform(f))(*ARGUMENTS) for f in (loss, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, theirs)


def test_derivatives_without_jit():
    for transform in (jax.grad, jax.value_and_grad):
        ours, theirs = (transform(f, argnums=ALL)(*ARGUMENTS) for f in (loss, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), ours, theirs)


def test_hessian_of_x():
    x = X[:3, :2]
    ours, theirs = (
        jax.jit(jax.hessian(partial(f, gamma=GAMMA, beta=BETA)))(x) for f in (small, partial(small, kernel="agnostic"))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", [[2.5, 2.5, 2.5], [1.0, 2.0, 7.0]])
def test_hessian_of_moments(values):
    """The Hessian is 2 (I - 1/n), also for a constant channel, whose m2 is at its minimum 0."""
    hessian = jax.jit(jax.hessian(lambda x: bn.moments(x, axis=()).m2))(jnp.asarray(values))
    np.testing.assert_allclose(hessian, 2 * (np.eye(3) - 1 / 3), rtol=1e-6)


def small(x, gamma, beta, kernel=None):
    y, _ = bnj.batch_norm(x, gamma, beta, training=True, activation="silu", kernel=kernel, eps=0.1)
    return jnp.sum(y**2 * DY[:3, :2])


@pytest.mark.parametrize("in_axes", [(0, None, None), (0, 0, 0), (1, None, 0), (None, 0, None), (2, 1, None)])
@pytest.mark.parametrize("order", [0, 1])
def test_vmap_is_a_batch_norm_for_each_lane(in_axes, order):
    """For any batched axis of any argument, the function and its gradient; also nested."""
    lanes = 4
    arguments = []
    for value, axis in zip(ARGUMENTS, in_axes, strict=True):
        many = jnp.stack([value * (1 + 0.1 * i) for i in range(lanes)])
        arguments.append(value if axis is None else jnp.moveaxis(many, 0, axis))
    function = jax.jit(loss if order == 0 else jax.grad(loss, argnums=ALL))
    lanewise = [
        function(*(a if axis is None else jnp.take(a, i, axis) for a, axis in zip(arguments, in_axes, strict=True)))
        for i in range(lanes)
    ]
    expected = jax.tree.map(lambda *values: jnp.stack(values), *lanewise)
    got = jax.vmap(function, in_axes)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    twice = jax.vmap(jax.vmap(function, in_axes), in_axes)(*(
        a if axis is None else jnp.stack([a, a * 0.9], axis) for a, axis in zip(arguments, in_axes, strict=True)
    ))  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-4), twice, got)


def test_vmap_computes_by_the_kernels():
    text = jax.jit(jax.vmap(jax.grad(loss), (0, None, None))).lower(jnp.stack([X, X]), GAMMA, BETA).as_text()
    assert text.count("custom_call @batchnorm_forward") == text.count("custom_call @batchnorm_backward") == 1


def test_vmap_of_masks(rng):
    masks = jnp.asarray(rng.random((4, 8, 5, 1)) < 0.6)
    function = lambda mask: bnj.batch_norm(X, GAMMA, BETA, training=True, mask=mask, masked_output="zero")[0]  # noqa: E731
    got = jax.vmap(function)(masks)
    np.testing.assert_allclose(got, jnp.stack([function(mask) for mask in masks]), atol=1e-6)


def test_vmap_with_an_axis_name_is_one_batch():
    def step(x):
        return bnj.batch_norm(x, GAMMA, BETA, RUNNING, training=True, axis_name="lanes")

    y, running = jax.vmap(step, axis_name="lanes")(X)
    expected, after = bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=True)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_allclose(running.spread[3], after.spread, rtol=1e-6)


def test_scan_over_batches():
    batches = jnp.stack([X, X * 2, X - 1])

    def step(running, x):
        y, running = bnj.batch_norm(x, GAMMA, BETA, running, training=True)
        return running, y

    running, y = jax.jit(lambda batches: jax.lax.scan(step, RUNNING, batches))(batches)
    expected = RUNNING
    for index, batch in enumerate(batches):
        one, expected = bnj.batch_norm(batch, GAMMA, BETA, expected, training=True)
        np.testing.assert_allclose(y[index], one, atol=2e-6)
    np.testing.assert_allclose(running.spread, expected.spread, rtol=1e-6)
    gradient = jax.grad(lambda gamma: jnp.sum(jax.lax.scan(
        lambda r, x: (r, loss(x, gamma, BETA)), 0.0, batches)[1]))(GAMMA)  # fmt: skip
    np.testing.assert_allclose(gradient, sum(jax.grad(loss, 1)(b, GAMMA, BETA) for b in batches), rtol=1e-4)


def test_donation():
    step = jax.jit(lambda x: bnj.batch_norm(x, GAMMA, BETA, training=True)[0], donate_argnums=0)
    expected = bnj.batch_norm(X, GAMMA, BETA, training=True)[0]
    given = X + 0
    np.testing.assert_allclose(step(given), expected, atol=2e-6)


def test_traced_flag_computes_one_branch():
    @jax.jit
    def step(x, training):
        return bnj.batch_norm(x, GAMMA, BETA, RUNNING, training=training)

    for training in (True, False):
        y, after = step(X, training)
        expected, expected_after = bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=training)
        np.testing.assert_allclose(y, expected, atol=2e-6)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), after, expected_after)
        ours, plain_ = (
            jax.grad(lambda x, k=k, t=training: jnp.sum(bnj.batch_norm(
                x, GAMMA, BETA, RUNNING, training=jnp.asarray(t), kernel=k)[0] * DY))(X)
            for k in (None, "agnostic")
        )  # fmt: skip
        np.testing.assert_allclose(ours, plain_, atol=1e-5)
    text = step.lower(X, True).as_text()
    assert "stablehlo.case" in text
    assert "batchnorm_forward" in text


@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda", "tpu")])
def test_export(platforms):
    """A training step with its gradients, as the generic implementation: the program may run without this library."""
    step = jax.jit(jax.value_and_grad(loss, argnums=ALL))
    exported = jax.export.export(step, platforms=platforms)(*ARGUMENTS)
    assert "stablehlo.custom_call @batchnorm" not in exported.mlir_module()
    for ours, theirs in zip(jax.tree.leaves(exported.call(*ARGUMENTS)), jax.tree.leaves(step(*ARGUMENTS)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_export_of_a_state():
    """The state of every tracked quantity crosses the boundary as a part of the structure."""
    for convention in ("flax", "lasagne-gist", "zygote-gist"):
        running = bn.RunningStatistics.initial(3, convention, like=X)
        step = jax.jit(lambda r, c=convention: bnj.batch_norm(X, running=r, training=True, convention=c, axis=-1)[1])
        np.testing.assert_allclose(
            jax.export.export(step)(running).call(running).spread, step(running).spread, rtol=1e-6
        )


def test_disable_jit():
    """`jax_disable_jit`, which debugging uses to print and step."""
    expected = jax.value_and_grad(loss, argnums=ALL)(*ARGUMENTS)
    with jax.disable_jit():
        results = jax.value_and_grad(loss, argnums=ALL)(*ARGUMENTS)
        assert isinstance(bnj.batch_norm(X, training=jnp.bool_(True))[0], jax.Array)
    for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_taylor_mode(masked):
    """`jet`: the derivatives along a line are those of nested forward mode."""
    mask = jnp.arange(8)[:, None, None] < 5 if masked else None

    def y(x):
        return bnj.batch_norm(x, GAMMA, BETA, training=True, activation="tanh", mask=mask)[0]

    def along(function):
        return lambda x: jax.jvp(function, (x,), (DY,))[1]

    with jax.enable_x64(True):
        directions = DY, jnp.zeros_like(X), jnp.zeros_like(X)
        series = jax.jit(lambda x: jet(y, (x,), (directions,))[1])(X)
        nested = jax.jit(lambda x: [of(x) for of in (along(y), along(along(y)), along(along(along(y))))])(X)
        for number, (ours, theirs) in enumerate(zip(series, nested, strict=True)):
            np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=str(number))


STATE = {
    "plain": {}, "masked": {"mask": jnp.asarray(np.random.default_rng(7).random((8, 5, 1)) < 0.6)},
    "lengths": {"lengths": jnp.arange(8) % 6}, "deviations": {"convention": "lasagne-gist", "axis": -1},
    "replaced": {"decay": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", STATE)
def test_derivatives_of_the_state(name):
    """Losses on the statistics (DeepInversion's): both modes and second order, against array code and differences."""
    options = STATE[name]
    convention = options.get("convention", "flax")

    def statistics_loss(x, running, kernel):
        _, after = bnj.batch_norm(x, running=running, training=True, kernel=kernel, **options)
        return jnp.sum((after.mean - 1) ** 2) + jnp.sum(jnp.cos(after.spread) * GAMMA)

    def derivatives(of, *point):
        gradient = jax.grad(of, argnums=(0, 1))
        return gradient(*point), jax.jvp(of, point, point), jax.jvp(gradient, point, point)[1]

    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        running = bn.RunningStatistics.initial(3, convention, like=x)
        results = []
        for kernel in ("native", "agnostic"):
            of = partial(statistics_loss, kernel=kernel)
            results.append(jax.jit(partial(derivatives, of))(x, running))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *results)
        step = 1e-4 * (1 + jnp.cos(x * 7))
        difference = of(x + step, running) - of(x - step, running)
        np.testing.assert_allclose(jnp.sum(results[0][0][0] * step), difference / 2, rtol=1e-4)
        assert abs(difference) > 1e-7


def test_derivatives_of_the_state_equal_flax_s():
    """Through `batch_stats`, where Flax has them."""
    theirs, ours = linen.BatchNorm(momentum=0.7), flax_layers.BatchNorm(momentum=0.7)
    variables = theirs.init(jax.random.key(0), X, use_running_average=False)

    def of(layer):
        def statistics_loss(x):
            y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
            return (
                jnp.sum(updated["batch_stats"]["mean"] ** 2) + jnp.sum(updated["batch_stats"]["var"] ** 3) + y[0, 0, 0]
            )

        return jax.grad(statistics_loss)(X)

    np.testing.assert_allclose(of(ours), of(theirs), rtol=1e-3, atol=1e-6)
    assert np.abs(of(theirs)).max() > 1e-3


@pytest.mark.parametrize("masked_output", ["zero", "normalized"])
@pytest.mark.parametrize("kind", ["mask", "by element", "lengths", "channels first"])
def test_derivatives_with_padding(kind, masked_output, rng):
    """Also of normalized padding, which is Flax's behavior: the kernels against the generic implementation."""
    x = X.at[1, 3:].set(jnp.nan) if kind != "by element" else X
    options = {
        "mask": {"mask": jnp.arange(5)[None, :, None] < jnp.asarray([5, 3, 0, 1, 2, 5, 4, 3])[:, None, None]},
        "by element": {"mask": jnp.asarray(rng.random(X.shape) < 0.6)},
        "lengths": {"lengths": jnp.asarray([5, 3, 0, 1, 2, 5, 4, 3])},
        "channels first": {"lengths": jnp.asarray([5, 3, 0, 1, 2, 5, 4, 3]), "axis": 1},
    }[kind]
    x = jnp.moveaxis(x, -1, 1) if kind == "channels first" else x
    residual = jnp.cos(3 * jnp.nan_to_num(x))

    def of(x, gamma, beta, residual, kernel):
        y, _ = bnj.batch_norm(
            x, gamma, beta, training=True, residual=residual, activation="silu", masked_output=masked_output,
            kernel=kernel, **options,
        )  # fmt: skip
        return jnp.sum(y**3)

    arguments = (x, GAMMA, BETA, residual)
    ours, theirs = (
        jax.jit(jax.value_and_grad(partial(of, kernel=kernel), argnums=(0, 1, 2, 3)))(*arguments)
        for kernel in ("native", "agnostic")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    assert np.isfinite(ours[1][0]).all()
    text = jax.jit(jax.grad(partial(of, kernel=None))).lower(*arguments).as_text()
    assert "batchnorm_forward" in text
    assert "batchnorm_backward" in text


def test_lengths_are_not_expanded():
    """With channels first, lengths do not become a mask; traced values beyond the time axis count as its end."""
    x = jnp.moveaxis(X, -1, 1)
    call = jax.jit(lambda x, lengths: bnj.batch_norm(x, training=True, axis=1, lengths=lengths)[0])
    lengths = jnp.asarray([5, 3, 0, 1, 2, 5, 4, 3])
    text = call.lower(x, lengths).as_text()
    assert "tensor<8x1x1x5xi1>" not in text
    assert "tensor<1x8x1x5xi1>" not in text
    np.testing.assert_array_equal(call(x, lengths.at[0].set(9)), call(x, lengths))
    lanes = jax.vmap(call, in_axes=(None, 0))(x, jnp.stack([lengths, lengths[::-1]]))
    np.testing.assert_array_equal(lanes[1], call(x, lengths[::-1]))


def test_lengths_along_the_height_of_images(rng):
    """Each counts whole rows of pixels, in either layout."""
    images, lengths = jnp.asarray(rng.normal(size=(4, 3, 5, 2)), jnp.float32), jnp.asarray([5, 2, 0, 4])
    mask = jnp.arange(5)[:, None] < lengths[:, None, None, None]
    for x, keep, axis in ((images, mask, 1), (jnp.moveaxis(images, 1, -1), jnp.moveaxis(mask, 1, -1), -1)):
        call = partial(bnj.batch_norm, x, training=True, axis=axis)
        y, after = call(lengths=lengths, kernel="native")
        expected, masked = call(mask=keep, kernel="agnostic")
        np.testing.assert_allclose(y, expected, atol=2e-6)
        np.testing.assert_allclose(after.spread, masked.spread, rtol=1e-5)


NUMBERS = [np.float32, np.float64, jnp.asarray, lambda value: np.asarray(value)]


@pytest.mark.parametrize("number", NUMBERS)
def test_eps_and_decay_as_arrays(number):
    y, after = bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=True, eps=number(0.25), decay=number(0.75))
    expected, other = bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=True, eps=0.25, decay=0.75)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(after.mean, other.mean)


def test_traced_eps_and_decay():
    """A schedule under jit, a sweep under vmap, and derivatives; the carry of a scan keeps its type."""
    step = jax.jit(lambda eps, decay: bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=True, eps=eps, decay=decay))
    expected = bnj.batch_norm(X, GAMMA, BETA, RUNNING, training=True, eps=0.25, decay=0.75)
    check = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, step(0.25, 0.75), expected)
    swept = jax.vmap(step)(jnp.asarray([0.1, 0.25]), jnp.asarray([0.5, 0.75]))
    jax.tree.map(lambda a, b: check(a[1], b), swept, expected)
    text = jax.jit(lambda decay: bnj.batch_norm(X, training=True, decay=decay)).lower(0.5).as_text()
    assert "batchnorm_forward" in text  # by the kernels, which do not use decay
    gradient = jax.grad(lambda eps: jnp.sum(step(eps, 0.5)[0] ** 2))(0.25)
    difference = (jnp.sum(step(0.26, 0.5)[0] ** 2) - jnp.sum(step(0.24, 0.5)[0] ** 2)) / 0.02
    np.testing.assert_allclose(gradient, difference, rtol=1e-2)
    with jax.enable_x64(True):
        carried, _ = jax.lax.scan(
            lambda r, d: (bnj.batch_norm(X, running=r, training=True, decay=d)[1], None), RUNNING, jnp.linspace(0, 1, 3)
        )
    assert carried.mean.dtype == jnp.float32


def test_the_axis_is_the_convention_s():
    """As in `batchnorm.batch_norm`, for any kind of axis."""
    x = jnp.moveaxis(X, -1, 1)
    expected = bn.batch_norm(x, convention="pytorch")[0]
    for options in ({}, {"axis": [1]}, {"axis": range(1, 2)}, {"axis": np.int64(1)}, {"axis": -2}):
        np.testing.assert_allclose(
            bnj.batch_norm(x, training=True, convention="pytorch", **options)[0], expected, atol=2e-6
        )
    assert bnj.batch_norm(x, training=True)[1].mean.shape == (5,)  # Flax's


def test_numpy_parameters():
    """NumPy arrays are accepted, as by JAX's own functions."""
    y, _ = bnj.batch_norm(X, np.asarray(GAMMA), np.asarray(BETA), training=True, mask=np.ones((8, 5, 1), bool))
    np.testing.assert_allclose(y, bnj.batch_norm(X, GAMMA, BETA, training=True)[0], atol=2e-6)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_are_array_code(platform):
    """XLA fuses the generic implementation, but could not fuse a call."""
    text = jax.jit(jax.grad(loss, argnums=ALL)).trace(*ARGUMENTS).lower(lowering_platforms=(platform,)).as_text()
    assert "batchnorm_forward" not in text
    assert "stablehlo.reduce" in text


def test_forward_and_backward_of_arrays():
    """`batchnorm.forward` and `backward` use these kernels for JAX's arrays."""
    y, cache = jax.jit(partial(bn.forward, axis=-1, activation="relu"))(X, GAMMA, BETA)
    expected, plain_cache = bn.forward(X, GAMMA, BETA, axis=-1, activation="relu", kernel="agnostic")
    np.testing.assert_allclose(y, expected, atol=2e-6)
    ours = jax.jit(bn.backward)(DY, cache)
    assert "batchnorm_backward" in jax.jit(bn.backward).lower(DY, cache).as_text()
    for a, b in zip(ours, bn.backward(DY, plain_cache), strict=True):
        assert (a is None) == (b is None)
        assert a is None or np.testing.assert_allclose(a, b, atol=1e-5) is None
