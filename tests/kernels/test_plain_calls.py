"""The unchecked fast path of calls without a mask has the results and the errors of the checked path."""

import numpy as np
import pytest
import torch
from layouts import DTYPES, tensor, with_layout
from libraries import every_native_library
from oracle import as_longdouble, check_gradients, check_y, expected

import batchnorm as bn
from batchnorm import _native
from batchnorm.kernels.native import FORWARD
from batchnorm.spec import spec_of


@every_native_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["c", "f", "last", "part1", "step2", "reversed0"])
def test_equals_the_checked_path(library, dtype, layout, extension, rng):
    shape = (4, 3, 17)
    x, dy, residual = (with_layout(rng.normal(size=shape).astype(DTYPES[dtype]), layout) for _ in range(3))
    channels = [rng.normal(size=3).astype(small) for small in (np.float32, np.float64)]
    x, dy, residual, gamma, beta = (library(a) for a in (x, dy, residual, *channels))
    bn.forward(x)  # from the second call on
    extension.calls.clear()
    y, cache = bn.forward(x, gamma, beta, activation="silu", residual=residual)
    gradients = bn.backward(dy, cache)
    if layout != "step2" and (library is tensor or dtype != "bfloat16"):
        assert extension.taken() == {"normalize": 1, "gradients": 1}
    slow_y, slow_cache = bn.forward(x, gamma, beta, activation="silu", residual=residual, kernel="native")
    assert y.dtype == slow_y.dtype
    assert cache.spec == slow_cache.spec
    assert type(cache.count) is type(slow_cache.count)
    pairs = zip((y, cache.count, *cache.statistics), (slow_y, slow_cache.count, *slow_cache.statistics), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(as_longdouble(ours), as_longdouble(theirs))
    exact = expected(x, dy, gamma, beta, residual, activation="silu")
    check_y(y, exact, dtype, "silu")
    check_gradients(gradients, exact, dtype)
    in_order = [dy + 0, slow_cache._replace(x=x + 0, residual=residual + 0)]
    check_gradients(bn.backward(*in_order), exact, dtype)


@every_native_library
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["c", "last", "step2"])
def test_into_an_array(library, dtype, layout, extension, rng):
    x, out, residual = (library(with_layout(rng.normal(size=(4, 3, 17)).astype(dtype), layout)) for _ in range(3))
    expected, _ = bn.forward(x, residual=residual, kernel="native")
    extension.calls.clear()
    y, cache = bn.forward(x, residual=residual, out=out)
    if layout != "step2":
        assert extension.taken() == {"normalize": 1}
    assert y is out
    assert cache.x is x
    np.testing.assert_array_equal(as_longdouble(y), as_longdouble(expected))
    assert bn.forward(x, residual=residual, out=residual)[0] is residual
    np.testing.assert_array_equal(as_longdouble(residual), as_longdouble(expected))
    plain_y, _ = bn.forward(x, kernel="native")
    assert bn.forward(x, out=x)[0] is x
    np.testing.assert_array_equal(as_longdouble(x), as_longdouble(plain_y))


def bad_calls():
    x, gamma = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    base = np.ones((5, 3), np.float32)
    return {
        "out of another shape": ((x,), {"out": base}),
        "out of another dtype": ((x,), {"out": np.ones((4, 3))}),
        "out of another library": ((x,), {"out": torch.ones(4, 3)}),
        "out that overlaps x": ((base[1:],), {"out": base[:-1]}),
        "out as a list": ((x,), {"out": [1.0]}),
        "gamma of another size": ((x, np.ones(4, np.float32)), {}),
        "gamma of size 1": ((x, np.ones(1, np.float32)), {}),
        "gamma of integers": ((x, np.ones(3, int)), {}),
        "gamma of complex numbers": ((x, np.ones(3, complex)), {}),
        "gamma of two dimensions": ((x, np.ones((3, 1), np.float32)), {}),
        "gamma as a list": ((x, [1.0, 1.0, 1.0]), {}),
        "gamma of another library": ((x, torch.ones(3)), {}),
        "gamma as a number": ((x, 1.0), {}),
        "beta of another size": ((x, gamma, gamma[:2]), {}),
        "beta of another library": ((x, gamma, torch.ones(3)), {}),
        "residual of another size": ((x,), {"residual": x[:3]}),
        "residual of another rank": ((x,), {"residual": x[0]}),
        "residual of another library": ((x,), {"residual": torch.ones(4, 3)}),
        "residual of integers": ((x,), {"residual": np.ones((4, 3), int)}),
        "negative eps": ((x,), {"eps": -1e-5}),
        "eps of NaN": ((x,), {"eps": float("nan")}),
        "infinite eps": ((x,), {"eps": float("inf")}),
        "eps as a boolean": ((x,), {"eps": True}),
        "eps as an array": ((x,), {"eps": np.ones(3)}),
        "axis out of range": ((x,), {"axis": 2}),
        "negative axis out of range": ((x,), {"axis": -3}),
        "axis as a boolean": ((x,), {"axis": True}),
        "axis as a float": ((x,), {"axis": 1.0}),
        "axis twice": ((x,), {"axis": (1, -1)}),
        "activation": ((x,), {"activation": "relux"}),
        "activation as a number": ((x,), {"activation": 3}),
        "x of integers": ((np.ones((4, 3), int),), {}),
        "x of complex numbers": ((np.ones((4, 3), complex),), {}),
        "x of long doubles": ((np.ones((4, 3), np.longdouble),), {}),
        "a scalar": ((np.ones((), np.float32),), {}),
        "a masked array": ((np.ma.masked_array(x),), {}),
    }


@every_native_library
@pytest.mark.parametrize("name", bad_calls())
def test_the_same_errors(library, name):
    arguments, options = bad_calls()[name]
    if library is tensor:
        if any(isinstance(a, torch.Tensor) for a in (*arguments, *options.values())) or name in (
            "x of long doubles", "a masked array",
        ):  # fmt: skip
            library = np.asarray
        convert = lambda a: library(a) if type(a) is np.ndarray else a  # noqa: E731
        arguments = [convert(a) for a in arguments]
        options = {key: value if key == "eps" else convert(value) for key, value in options.items()}
    bn.forward(library(np.ones((2, 2), np.float32)))
    with pytest.raises((TypeError, ValueError)) as step_by_step:
        bn.forward(*arguments, kernel="agnostic", **options)
    with pytest.raises(step_by_step.type) as at_once:
        bn.forward(*arguments, **options)
    assert str(at_once.value) == str(step_by_step.value)


@every_native_library
def test_dy_that_does_not_fit(library):
    x = library(np.ones((4, 3), np.float32))
    _, cache = bn.forward(x)
    bn.backward(x, cache)
    for dy in (x[:3], x[0], x[:, :2]):
        with pytest.raises(ValueError, match=r"dy has shape .* it must be that of x"):
            bn.backward(dy, cache)
    other = torch.ones(4, 3) if library is np.asarray else np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match=r"dy is a .* but x is a"):
        bn.backward(other, cache)


def test_a_callable_activation_after_a_plain_call():
    x = np.ones((4, 3), np.float32)
    y, cache = bn.forward(x, activation=np.exp)
    np.testing.assert_array_equal(y, 1)
    with pytest.raises(ValueError, match="derivative of <ufunc 'exp'> is not known"):
        bn.backward(x, cache)


def test_subclasses_of_arrays_come_out_as_arrays(rng):
    class Mine(np.ndarray):
        pass

    x, residual = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))
    y, _ = bn.forward(x, residual=residual)
    for _ in range(3):
        mine, cache = bn.forward(x.view(Mine), residual=residual)
        assert type(mine) is np.ndarray
        np.testing.assert_array_equal(mine, y)
        assert type(bn.backward(residual, cache).dx) is np.ndarray
        assert type(bn.backward(residual.view(Mine), cache).dx) is np.ndarray


def test_recorded_calls_are_recorded():
    x = torch.randn(4, 3)
    bn.forward(x)
    leaf = x.clone().requires_grad_()
    y, cache = bn.forward(leaf)
    assert y.requires_grad
    assert bn.backward(y.detach(), cache).dx.requires_grad
    with torch.no_grad():
        assert not bn.forward(leaf)[0].requires_grad
    each = torch.func.vmap(lambda x: bn.forward(x)[0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(each[0], bn.forward(x)[0])


def test_an_interrupt_is_not_swallowed():
    """Ctrl-C while the library allocates a result; any other error of it as well."""
    x, spec = np.ones((4, 3), np.float32), spec_of("pytorch", 1, 2)
    for error in (KeyboardInterrupt, MemoryError, TypeError):

        def empty_like(array, error=error):
            raise error

        library = _native.Library((np.ndarray,), empty_like, empty_like, np.empty)
        with pytest.raises(error):
            _native.normalize(library, FORWARD, spec.native, (x, None, None, None, None), None, None, 1)
