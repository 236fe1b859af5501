"""The C++ running update against the generic implementation, for every convention and kind of batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimized import optimized_jit

import batchnorm as bn
import batchnorm.jax as bnj

DEBIASED = {
    f"{debias}, decay {decay}": replace(bn.CONVENTIONS["pytorch"], name="other", debias=debias, decay=decay)
    for debias in ("none", "adam", "weight_sum", "first_batch")
    for decay in (0.0, 0.3, 1.0, None)
    if debias != "weight_sum" or decay is not None
}
TRACKED = {
    tracked: replace(
        bn.CONVENTIONS["pytorch"], name="other", tracked=tracked, correction_on=correction_on, single="identity",
        eps_eval="absent" if tracked in ("std_eps", "rstd", "var_eps") else "inside", initial_spread=0.5,
    )
    for tracked, correction_on in (
        ("var", "tracked"), ("std", "variance"), ("std_eps", "tracked"), ("rstd", "variance"), ("var_eps", "tracked"),
        ("log10_std", "variance"),
    )
}  # fmt: skip
CONVENTIONS = {**bn.CONVENTIONS, **DEBIASED, **TRACKED}


def batches(convention, dtype):
    """Batches (6, 4) and masks: ordinary, with NaN, without elements, with channels of one and of no element."""
    generator = np.random.default_rng(11)
    x = generator.normal(1, 2, (6, 6, 4))
    x[2, 3, 1] = np.nan
    keep = generator.random((6, 6, 4)) < 0.8
    keep[3] = False
    keep[4, :, 0] = False
    keep[4, :, 1] = [True] + [False] * 5
    return [(jnp.asarray(one, dtype), jnp.asarray(mask)) for one, mask in zip(x, keep, strict=True)]


def states(kernel, convention, *, masked, dtype=jnp.float32):
    """The state after each batch."""
    update = jax.jit(
        lambda x, running, **mask: bnj.batch_norm(
            x, None, None, running, training=True, axis=1, convention=convention, kernel=kernel, **mask, **single
        )[1]
    )
    single = {"single": "clamp"} if masked and convention.single == "error" else {}
    running = bn.RunningStatistics.initial(4, convention, like=jnp.zeros((), dtype))
    found = []
    for x, keep in batches(convention, dtype):
        running = update(x, running, **({"mask": keep} if masked else {}))
        found.append(running)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention(name, masked):
    pairs = zip(*(states(kernel, CONVENTIONS[name], masked=masked) for kernel in ("native", "agnostic")), strict=True)
    for native, agnostic in pairs:
        assert type(native) is type(agnostic)
        for ours, expected in zip(native, agnostic, strict=True):
            assert ours.dtype == expected.dtype
            np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=3e-7)
        assert native.steps == agnostic.steps
        assert native.skipped == agnostic.skipped


def test_the_batches_are_told_apart():
    last = states("native", CONVENTIONS["flax"], masked=True)[-1]
    assert (float(last.steps), float(last.skipped)) == (4, 1)  # one of six is skipped, and one is empty


def test_float64():
    with jax.enable_x64(True):
        for name in ("keras", "weight_sum, decay 0.3", "rstd"):
            found = [
                states(kernel, CONVENTIONS[name], masked=True, dtype=jnp.float64)[-1]
                for kernel in ("native", "agnostic")
            ]
            for ours, expected in zip(*found, strict=True):
                assert ours.dtype == jnp.float64
                np.testing.assert_allclose(ours, expected, rtol=1e-14, atol=1e-15)


def step(x, running, **options):
    return bnj.batch_norm(x, None, None, running, training=True, decay=0.75, **options)[1]


def test_it_is_one_call():
    running = bn.RunningStatistics.initial(64, "flax", like=jnp.zeros(()))
    x, keep = jnp.ones((8, 5, 64)), jnp.ones((8, 5, 1), bool)
    for options in ({}, {"mask": keep}, {"lengths": jnp.full(8, 3)}):
        program = optimized_jit(lambda x, running, options=options: step(x, running, **options))
        text = program.lower(x, running).compile().as_text()
        assert "batchnorm_advance" in text
        assert "reduce" not in text


def test_lanes_are_refused_by_themselves():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 2)), jnp.float32).at[1, 0, 0].set(jnp.inf)
    running = bn.RunningStatistics.initial(2, "flax", like=x)
    update = jax.jit(lambda x: step(x, running))
    updated = jax.vmap(update)(x)
    assert updated.skipped.tolist() == [0, 1, 0]
    assert updated.steps.tolist() == [1, 0, 1]
    for lane in range(3):
        for ours, expected in zip(updated, update(x[lane]), strict=True):
            np.testing.assert_array_equal(ours[lane], expected)


def test_derivatives_with_respect_to_the_state():
    generator = np.random.default_rng(1)
    x = jnp.asarray(generator.normal(size=(8, 3)), jnp.float32)
    running = bn.RunningStatistics.initial(3, "flax", like=x)

    def loss(x, mean, kernel=None):
        updated = step(x, running._replace(mean=mean), kernel=kernel)
        return jnp.sum(updated.mean**2) + jnp.sum(updated.spread**3)

    mean = jnp.asarray(generator.normal(size=3), jnp.float32)
    native, agnostic = (jax.grad(loss, argnums=(0, 1))(x, mean, kernel) for kernel in (None, "agnostic"))
    for ours, expected in zip(native, agnostic, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)
    expected = 2 * 0.75 * (0.75 * mean + 0.25 * x.mean(0))
    np.testing.assert_allclose(native[1], expected, rtol=1e-5)
    tangents = [jax.jvp(lambda m, k=k: loss(x, m, k), (mean,), (mean,))[1] for k in (None, "agnostic")]
    np.testing.assert_allclose(*tangents, rtol=1e-5)
    hessians = [jax.jit(jax.hessian(lambda x, k=k: loss(x, mean, k)))(x) for k in (None, "agnostic")]
    np.testing.assert_allclose(*hessians, rtol=1e-4, atol=1e-6)


def test_a_schedule_takes_array_code():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, 3)), jnp.float32)
    running = bn.RunningStatistics.initial(3, "flax", like=x)
    traced = jax.jit(lambda decay: bnj.batch_norm(x, None, None, running, training=True, decay=decay)[1])(0.6)
    known = bnj.batch_norm(x, None, None, running, training=True, decay=0.6)[1]
    for ours, expected in zip(traced, known, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_numbers_of_numpy():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, 3)), jnp.float32)
    for number in (np.float32(0.75), np.float64(0.75), 0.75):
        for call in (bnj.batch_norm, bn.batch_norm):
            updated = call(x, training=True, axis=1, decay=number, eps=number)[1]
            np.testing.assert_allclose(updated.mean, 0.25 * x.mean(0), rtol=1e-5)
