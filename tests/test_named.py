"""xarray: dimensions by name in, coordinates out."""

import numpy as np
import pytest
import xarray as xr

import batchnorm as bn

X = xr.DataArray(
    np.random.default_rng(2).normal(size=(4, 5, 3)),
    dims=("time", "station", "channel"),
    coords={"time": np.arange(4) * 10, "channel": ["u", "v", "w"]},
    name="wind",
    attrs={"units": "m/s"},
)
GAMMA = xr.DataArray([1.0, 2.0, 3.0], dims="channel")


def test_coordinates_name_and_attributes_are_kept():
    y, running = bn.batch_norm(X, GAMMA, axis="channel")
    expected, _ = bn.batch_norm(X.values, GAMMA.values, axis=-1)
    np.testing.assert_array_equal(y.values, expected)
    xr.testing.assert_equal(y.coords.to_dataset(), X.coords.to_dataset())
    assert (y.name, y.attrs, y.dims) == ("wind", {"units": "m/s"}, X.dims)
    assert isinstance(running.mean, np.ndarray)


def test_operands_are_aligned_by_name():
    mask = xr.DataArray(
        np.array([[True, False, True, True], [True] * 4, [True, True, False, False]]), dims=("channel", "time")
    )
    residual = X.transpose("channel", "station", "time") * 2
    y, cache = bn.forward(X, GAMMA, axis="channel", mask=mask, residual=residual)
    plain_mask = mask.values.T[:, None, :]
    expected, plain_cache = bn.forward(X.values, GAMMA.values, axis=-1, mask=plain_mask, residual=2 * X.values)
    np.testing.assert_array_equal(y.values, expected)
    gradients = bn.backward(y.transpose("station", "channel", "time"), cache)
    plain = bn.backward(expected, plain_cache)
    assert gradients.dx.dims == X.dims
    np.testing.assert_array_equal(gradients.dx.values, plain.dx)
    np.testing.assert_array_equal(gradients.dresidual.values, plain.dresidual)
    np.testing.assert_array_equal(gradients.dgamma, plain.dgamma)
    moments = bn.moments(X, axis="channel", mask=mask)
    np.testing.assert_array_equal(moments.count, 5 * plain_mask.sum(axis=(0, 1)))


def test_lengths_and_several_named_axes():
    y, _ = bn.forward(X, axis=("channel", "station"))
    np.testing.assert_allclose(y.mean("time"), 0, atol=1e-12)
    y, _ = bn.forward(X, axis="channel", lengths=xr.DataArray([5, 2, 0, 1], dims="time"))
    assert (y.values[1, 2:] == 0).all()
    assert (y.values[1, :2] != 0).all()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: bn.batch_norm(X, axis="chanel"), "x has no dimension 'chanel'; it has 'time', 'station', 'channel'"),
    (lambda: bn.batch_norm(X, GAMMA.rename(channel="c"), axis="channel"), "gamma has a dimension 'c' that x has not"),
    (lambda: bn.backward(X.rename(time="t"), bn.forward(X, axis="channel")[1]), "those of x were"),
    (lambda: bn.backward(X, bn.forward(X.values)[1]), "those of x were None"),
])  # fmt: skip
def test_wrong_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_need_a_named_x():
    with pytest.raises(TypeError, match=r"gamma is an xarray\.DataArray, but x is not"):
        bn.batch_norm(X.values, GAMMA, axis=-1)
    with pytest.raises(TypeError, match=r"mask is an xarray\.DataArray, but x is not"):
        bn.moments(X.values, axis=-1, mask=X > 0)
