"""The warning of a skipped batch points at the user's line and fits the function or layer that was called."""

import inspect
import warnings

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchnorm as bn
import batchnorm.flax
import batchnorm.jax as bnj
from batchnorm.flax import linen, nnx

BAD = jnp.asarray([[1.0, 2.0], [jnp.nan, 4.0], [5.0, 6.0]])
PARAMETERS = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
VARIABLES = {"params": PARAMETERS, "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
START = "the statistics of a batch are not finite (NaN, Inf or overflow in x): it did not enter the running statistics"
FUNCTION = " and is counted in running.skipped"
LAYER = "; layers of batchnorm.flax with count_skipped=True count such batches"
COUNTED = " and is counted in the variable `skipped`"


def call_linen(of=linen.BatchNorm, options=(), variables=VARIABLES):
    layer = of(use_running_average=False, **dict(options))
    return layer.apply(variables, BAD, mutable=["batch_stats"])


def call_nnx(**options):
    return nnx.BatchNorm(2, rngs=flax.nnx.Rngs(0), **options)(BAD)


def call_replaced():
    with batchnorm.flax.replaced():
        return call_linen(flax.linen.BatchNorm)


def call_within_a_network():
    network = flax.linen.Sequential([linen.BatchNorm(use_running_average=False)])
    variables = {kind: {"layers_0": values} for kind, values in VARIABLES.items()}
    return network.apply(variables, BAD, mutable=["batch_stats"])


def call_in_forward_mode():
    return jax.jvp(lambda x: bnj.batch_norm(x, training=True, axis=-1)[0], (BAD,), (BAD,))


def call_implicit_linen():
    layer = linen.ImplicitBatchNorm()
    parameters = layer.init(jax.random.key(0), jnp.ones((3, 2)))
    return jax.grad(lambda parameters: layer.apply(parameters, BAD).sum())(parameters)


def call_implicit_nnx():
    layer = nnx.ImplicitBatchNorm(2, rngs=flax.nnx.Rngs(0))
    return flax.nnx.grad(lambda layer: layer(BAD).sum())(layer)


def call_advance():
    return bn.advance(bn.RunningStatistics.initial(2), bn.moments(np.asarray(BAD)))


CALLS = {
    "numpy": (lambda: bn.batch_norm(np.asarray(BAD)), FUNCTION),
    "numpy, checked": (lambda: bn.batch_norm(np.asarray(BAD), mask=np.ones((3, 1), bool)), FUNCTION),
    "advance": (call_advance, FUNCTION),
    "jax": (lambda: bn.batch_norm(BAD), FUNCTION),
    "function of jax": (lambda: bnj.batch_norm(BAD, training=True), FUNCTION),
    "forward mode": (call_in_forward_mode, FUNCTION),
    "linen": (call_linen, LAYER),
    "linen, callable": (lambda: call_linen(options={"activation": jnp.sin}), LAYER),
    "nnx, lengths": (lambda: nnx.BatchNorm(2, rngs=flax.nnx.Rngs(0))(BAD[None], lengths=jnp.asarray([3])), LAYER),
    "linen, within": (call_within_a_network, LAYER),
    "linen, replaced": (call_replaced, LAYER),
    "nnx": (call_nnx, LAYER),
    "nnx, callable": (lambda: call_nnx(activation=jnp.sin), LAYER),
    "nnx, counted": (lambda: call_nnx(count_skipped=True), COUNTED),
    "nnx, counted, callable": (lambda: call_nnx(count_skipped=True, activation=jnp.sin), COUNTED),
    "implicit linen": (call_implicit_linen, FUNCTION),
    "implicit nnx": (call_implicit_nnx, FUNCTION),
}


def lines_of_this_file(function):
    lines, first = inspect.getsourcelines(function)
    return range(first, first + len(lines))


@pytest.mark.parametrize("name", CALLS)
def test_the_warning_is_at_the_users_line(name):
    call, remark = CALLS[name]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        call()
    assert [str(one.message) for one in warned] == [START + remark]
    assert warned[0].filename == __file__
    own = [call, call_linen, call_nnx]
    assert any(warned[0].lineno in lines_of_this_file(function) for function in own)


def test_the_words_of_a_layer_end_with_its_call():
    """A layer's wording ends with its call, even a failed one: a function called afterwards has its own."""
    with pytest.raises(ZeroDivisionError):
        call_nnx(activation=lambda z: 1 / 0)
    with pytest.warns(RuntimeWarning, match="counted in running.skipped"):
        bnj.batch_norm(BAD, training=True)


def test_tensors_and_layers_of_torch():
    torch = pytest.importorskip("torch")
    import batchnorm.torch as bnt

    x = torch.from_numpy(np.array(BAD))
    for call in (bn.batch_norm, bnt.BatchNorm1d(2), torch.nn.Sequential(bnt.BatchNorm1d(2)), bnt.BatchNorm(2)):
        with pytest.warns(RuntimeWarning, match="did not enter the running statistics") as warned:
            call(x)
        assert warned[0].filename == __file__
        assert warned[0].lineno in lines_of_this_file(test_tensors_and_layers_of_torch)
