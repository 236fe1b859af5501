"""Bad input: one clear error each, raised before anything is computed or changed."""

import pickle
import re

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import batchnorm as bn

X = np.random.default_rng(3).normal(size=(4, 3, 5))
ONES = np.ones(3)
SEQUENCE = X.transpose(0, 2, 1)
RUNNING = bn.RunningStatistics.initial(3, like=X)

#: arguments of batch_norm, and the error they must raise
BATCH_NORM = {
    "list": ({"x": [[1.0]]}, TypeError, "x is a list; it must be an array"),
    "integers": ({"x": np.arange(12).reshape(4, 3)}, TypeError, "x has dtype int64; it must be one of float16, bfloat16"),
    "booleans": ({"x": np.ones((4, 3), bool)}, TypeError, "x has dtype bool"),
    "complex": ({"x": np.ones((4, 3), complex)}, TypeError, "x has dtype complex128"),
    "masked array": ({"x": np.ma.masked_invalid(X)}, TypeError, "x is a masked array; pass x.data, and mask=~x.mask"),
    "scalar": ({"x": np.array(1.0)}, ValueError, "x is a scalar; batch normalization needs at least one dimension"),
    "rank": ({"x": np.ones(3)}, ValueError, "axis 1 is out of range for x with 1 dimension; allowed are -1 to 0"),
    "axis": ({"axis": 3}, ValueError, "axis 3 is out of range for x with 3 dimensions; allowed are -3 to 2"),
    "axis twice": ({"axis": (1, -2)}, ValueError, "axis (1, -2) names an axis twice"),
    "axis float": ({"axis": 1.0}, TypeError, "axis is 1.0; it must be an integer"),
    "axis floats": ({"axis": (1.0,)}, TypeError, "axis is (1.0,); it must be an integer"),
    "axis name": ({"axis": "channel"}, ValueError, "axis is 'channel', but x has no named dimensions"),
    "gamma shape": (
        {"gamma": np.ones(4)},
        ValueError,
        "gamma has shape (4,), but x with shape (4, 3, 5) has channels (3,) along axis 1; give gamma shape (3,)",
    ),
    "gamma rank": ({"gamma": np.ones((1, 3, 1))}, ValueError, "gamma has shape (1, 3, 1)"),
    "beta shape": ({"beta": np.ones(5)}, ValueError, "beta has shape (5,)"),
    "gamma library": ({"gamma": torch.ones(3)}, TypeError, "gamma is a torch.Tensor, but x is a numpy.ndarray; convert"),
    "gamma integers": ({"gamma": np.ones(3, int)}, TypeError, "gamma has dtype int64"),
    "running type": ({"running": (ONES, ONES)}, TypeError, "running is a tuple; it must be a batchnorm.RunningStatistics"),
    "running shape": ({"running": bn.RunningStatistics.initial(4, like=X)}, ValueError, "running.mean has shape (4,)"),
    "running steps": (
        {"running": RUNNING._replace(steps=np.ones(3))},
        TypeError,
        "running.steps is array([1., 1., 1.]); it must be a number or a scalar array",
    ),
    "running weight": (
        {"running": RUNNING._replace(weight=torch.ones(()))},
        TypeError,
        "running.weight is a torch.Tensor, but x is a numpy.ndarray",
    ),
    "running missing": ({"running": None, "training": False}, ValueError, "running is None at inference, which normalizes"),
    "training": ({"training": 1}, TypeError, "training is 1; it must be True, False or a scalar boolean array"),
    "training array": ({"training": np.array([True])}, TypeError, "it must be True, False or a scalar boolean"),
    "eps negative": ({"eps": -1e-5}, ValueError, "eps is -1e-05; it must be finite and >= 0"),
    "eps nan": ({"eps": float("nan")}, ValueError, "eps is nan"),
    "eps type": ({"eps": "1e-5"}, TypeError, "eps is '1e-5' (str); it must be a Python number >= 0"),
    "eps zero": ({"eps": 0.0}, ValueError, "eps must be positive in training, but is 0: pytorch refuses it"),
    "decay": ({"decay": 1.1}, ValueError, "decay is 1.1; it is the weight of the old running value and must lie in [0, 1]"),
    "decay type": ({"decay": np.ones(3)}, TypeError, "it must be a Python number in [0, 1]"),
    "convention": (
        {"convention": "lasagne"},
        ValueError,
        "no convention is called 'lasagne'; did you mean 'lasagne-gist'",
    ),
    "convention type": ({"convention": 3}, TypeError, "convention is a int; pass a name or a batchnorm.Convention"),
    "single": ({"single": "ignore"}, ValueError, "single is 'ignore'; allowed are 'error', 'clamp', 'identity', 'running'"),
    "masked_output": ({"masked_output": "nan"}, ValueError, "masked_output is 'nan'; allowed are 'zero', 'normalized'"),
    "mask shape": ({"mask": np.ones((4, 5), bool)}, ValueError, "mask of shape (4, 5) does not broadcast to x of shape"),
    "mask too large": ({"mask": np.ones((1, 4, 3, 5), bool)}, ValueError, "does not broadcast to x"),
    "mask hint": ({"mask": np.ones((4, 3), bool)}, ValueError, "pass mask.reshape((4, 3, 1))"),
    "mask integers": ({"mask": np.ones((4, 1, 5), int)}, TypeError, "mask has dtype int64; it must be boolean"),
    "mask and lengths": (
        {"mask": np.ones((4, 1, 5), bool), "lengths": [1, 2, 3, 4]},
        ValueError,
        "mask and lengths are both given",
    ),
    "lengths shape": ({"lengths": [1, 2]}, ValueError, "lengths has shape (2,); it must be (4,)"),
    "lengths large": ({"lengths": [1, 2, 3, 6]}, ValueError, "each must lie in 0 to 5, the size of axis 2 of x"),
    "lengths negative": ({"lengths": [1, 2, 3, -1]}, ValueError, "each must lie in 0 to 5"),
    "lengths floats": ({"lengths": [1.0, 2.0, 3.0, 4.0]}, TypeError, "lengths has dtype float64; it must hold integers"),
    "mask of strings": ({"mask": ["a", "b", "c", "d", "e"]}, TypeError, "mask is a list of strings; it must be boolean"),
    "mask of objects": ({"mask": [None] * 5}, TypeError, "mask is a list of objects; it must be boolean"),
    "mask of a list of integers": (
        {"mask": [[[1, 0, 1, 1, 1]]]},
        TypeError,
        "mask has dtype int64; it must be boolean, True where x counts: pass numpy.asarray(mask) != 0",
    ),
    "mask of a list of floats": ({"mask": [1.0] * 5}, TypeError, "mask has dtype float64; it must be boolean"),
    "mask ragged": ({"mask": [[True], [True, False]]}, TypeError, "mask is a list whose parts differ in shape; it must be bool"),
    "mask string": ({"mask": "all"}, TypeError, "mask is a str of strings; it must be boolean"),
    "lengths booleans": ({"lengths": [True] * 4}, TypeError, "lengths has dtype bool; it must hold integers, one for each"),
    "lengths strings": ({"lengths": ["1"] * 4}, TypeError, "lengths is a list of strings; it must hold integers"),
    "lengths ragged": ({"lengths": [[1], [2, 3]]}, TypeError, "lengths is a list whose parts differ in shape; it must hold"),
    "lengths nested": ({"lengths": [[1, 2, 3, 4]]}, ValueError, "lengths has shape (1, 4); it must be (4,)"),
    "lengths rank": ({"x": np.ones((4, 3)), "lengths": [1] * 4}, ValueError, "lengths needs a batch axis and a time axis"),
    "activation": ({"activation": "reluu"}, ValueError, "no activation is called 'reluu'; did you mean 'relu'?"),
    "activation slope": ({"activation": "leaky_relu(x)"}, ValueError, "slope of 'leaky_relu(x)' is not a finite number"),
    "activation type": ({"activation": 3}, TypeError, "activation is 3; it must be a name, a callable"),
    "residual shape": ({"residual": np.ones((4, 3, 1))}, ValueError, "residual has shape (4, 3, 1); it must be that of x"),
    "residual library": ({"residual": torch.ones(4, 3, 5)}, TypeError, "residual is a torch.Tensor, but x is a numpy"),
    "kernel": ({"kernel": "cuda"}, ValueError, "no kernel is called 'cuda'; known are native, agnostic"),
    "out shape": ({"out": np.ones((4, 3))}, ValueError, "out is float64 of shape (4, 3); it must be float64 of shape (4, 3, 5)"),
    "out dtype": ({"out": np.ones_like(X, np.float32)}, ValueError, "out is float32 of shape"),
    "single element": (
        {"x": X[:1, :, :1]},
        ValueError,
        "x of shape (1, 3, 1) has one element per channel, which has no variance, and pytorch refuses it in training",
    ),
    "single element after masking": (
        {"lengths": [1, 0, 0, 0]},
        ValueError,
        "has one element per channel after masking",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BATCH_NORM.values(), ids=BATCH_NORM)
def test_batch_norm_refuses(arguments, error, message):
    arguments = {"x": X, "running": RUNNING, **arguments}
    if arguments["x"] is not X and "running" in arguments and arguments["running"] is RUNNING:
        arguments["running"] = None if getattr(arguments["x"], "ndim", 0) < 2 else RUNNING
    state = pickle.dumps(RUNNING)
    with pytest.raises(error, match=re.escape(message)) as raised:
        bn.batch_norm(**arguments)
    assert type(raised.value) is error
    assert pickle.dumps(RUNNING) == state
    if isinstance(arguments.get("out"), np.ndarray):
        assert (arguments["out"] == 1).all()


@pytest.mark.parametrize("like", [torch.tensor, jnp.asarray, array_api_strict.asarray])
def test_lists_of_a_wrong_type_beside_any_array(like):
    """Lists raise this library's errors, not those of the array library that would convert them."""
    x = like(X.astype(np.float32))
    for mask in (["a"] * 5, [[True], [True, False]], [1, 0, 1, 1, 1], [0.5] * 5):
        for call in (bn.batch_norm, bn.forward, bn.moments):
            with pytest.raises(TypeError, match=r"^mask .* it must be boolean, True where x counts: pass numpy"):
                call(x, mask=mask)
    for lengths in (["a"] * 4, [[1], [2, 3]], [1.5] * 4, [True] * 4):
        for call in (bn.batch_norm, bn.forward):
            with pytest.raises(TypeError, match=r"^lengths .* it must hold integers, one for each sequence of x"):
                call(x, lengths=lengths)


def test_lists_of_a_right_type_are_taken():
    y, _ = bn.forward(X, mask=[[[True, True, False, True, False]]])
    expected, _ = bn.forward(X, mask=np.array([[[True, True, False, True, False]]]))
    np.testing.assert_array_equal(y, expected)
    y, _ = bn.forward(X, lengths=(1, 2, 3, 0))
    expected, _ = bn.forward(X, lengths=np.array([1, 2, 3, 0]))
    np.testing.assert_array_equal(y, expected)
    assert bn.forward(X[:0], lengths=[])[0].shape == (0, 3, 5)
    assert bn.forward(X[..., :0], mask=[])[0].shape == (4, 3, 0)


def test_out_is_untouched_by_an_error():
    out = np.full_like(X, 7.0)
    with pytest.raises(ValueError, match="gamma has shape"):
        bn.batch_norm(X, np.ones(2), out=out)
    assert (out == 7).all()


def test_out_must_be_writable():
    out = np.ones_like(X)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only; pass a writable array"):
        bn.forward(X, out=out)
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="are not changed in place; drop out="):
        bn.forward(x, out=x)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"eps": -1.0}, ValueError, "eps is -1.0"),
    ({"x": [1.0]}, TypeError, "x is a list"),
    ({"axis": 7}, ValueError, "axis 7 is out of range"),
    ({"gamma": np.ones(2)}, ValueError, "gamma has shape (2,)"),
    ({"activation": "mish"}, ValueError, "no activation is called 'mish'"),
    ({"kernel": "fast"}, ValueError, "no kernel is called 'fast'"),
    ({"lengths": [9, 9, 9, 9]}, ValueError, "each must lie in 0 to 5"),
])  # fmt: skip
def test_forward_refuses(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        bn.forward(**{"x": X, **arguments})


@pytest.mark.parametrize(("dy", "error", "message"), [
    (np.ones((4, 3)), ValueError, "dy has shape (4, 3); it must be that of x, (4, 3, 5)"),
    (np.ones((4, 3, 5), int), TypeError, "dy has dtype int64"),
    (torch.ones(4, 3, 5), TypeError, "dy is a torch.Tensor, but x is a numpy.ndarray"),
    ("dy", TypeError, "dy is a str; it must be an array"),
])  # fmt: skip
def test_backward_refuses(dy, error, message):
    _, cache = bn.forward(X)
    with pytest.raises(error, match=re.escape(message)):
        bn.backward(dy, cache)


def test_moments_and_affine_refuse():
    with pytest.raises(TypeError, match="x has dtype int64"):
        bn.moments(np.arange(3))
    with pytest.raises(ValueError, match="mask of shape"):
        bn.moments(X, mask=np.ones((2, 1, 1), bool))
    with pytest.raises(TypeError, match="running is a float"):
        bn.affine(None, None, 1.0)
    with pytest.raises(ValueError, match=re.escape("gamma has shape (2,)")):
        bn.affine(np.ones(2), None, RUNNING)
    with pytest.raises(ValueError, match="no convention is called 'torchh'; did you mean 'pytorch'"):
        bn.affine(None, None, RUNNING, "torchh")
    with pytest.raises(ValueError, match="no convention is called"):
        bn.RunningStatistics.initial(3, "nobody's")


def test_eps_zero_is_refused_only_where_the_system_refuses_it():
    y, _ = bn.batch_norm(X, eps=0.0, convention="flax", axis=1)
    assert np.isfinite(y).all()
    y, _ = bn.batch_norm(X, running=RUNNING, eps=0.0, training=False)
    np.testing.assert_array_equal(y, X)


def test_no_axis_passes_because_an_equal_integer_did():
    for ones in ((1,), (0,)):
        bn.batch_norm(X, axis=ones)
    for axis, name in (((1.0,), "(1.0,)"), ((True,), "(True,)"), ((False,), "(False,)")):
        with pytest.raises(TypeError, match=re.escape(f"axis is {name}; it must be an integer")):
            bn.batch_norm(X, axis=axis)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), (0, 1)), ((7,), 0), ((7,), -1), ((4, 1, 5), (0, 2)), ((1, 3), 1)])
def test_one_element_per_channel_along_any_axes(shape, axis):
    for array in (np.ones(shape, np.float32), torch.ones(shape)):
        with pytest.raises(ValueError, match="has one element per channel, which has no variance"):
            bn.batch_norm(array, axis=axis)
