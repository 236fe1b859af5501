"""The specification itself, against 60-digit arithmetic and against the definition of a derivative."""

import numpy as np
import pytest
from golden import case_inputs, load

from batchnorm import reference

CASES = ("d2", "d3", "d4", "d5", "seq", "ill", "const", "single", "single4")
EPS = {"eps1e-5": 1e-5, "eps1e-3": 1e-3}


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_exact_arithmetic(case, eps):
    exact = {name: load("exact")[f"exact/{case}/{eps}/{name}"] for name in ("y", "dx", "dgamma", "dbeta", "mean")}
    inputs = case_inputs(case)
    axis = int(inputs["channel_axis"]) % inputs["x"].ndim
    rows, dy = (reference.as_rows(inputs[name], axis) for name in ("x", "dy"))
    y = reference.forward(rows, inputs["gamma"], inputs["beta"], EPS[eps]).y
    gradients = reference.backward(dy, rows, inputs["gamma"], EPS[eps])
    # `ill` has mean/std = 1e6 and loses six digits to the float64 mean
    bound = {"rtol": 0, "atol": 1e-9 if case == "ill" else 5e-14}
    np.testing.assert_allclose(reference.from_rows(y, inputs["x"].shape, axis), exact["y"], **bound)
    dx = reference.from_rows(gradients.dx, inputs["x"].shape, axis)
    scale = max(1, np.abs(exact["dx"]).max())
    np.testing.assert_allclose(dx / scale, exact["dx"] / scale, **bound)
    np.testing.assert_allclose(gradients.dgamma, exact["dgamma"], **bound)
    np.testing.assert_allclose(gradients.dbeta, exact["dbeta"], **bound)


def test_gradients_are_derivatives():
    inputs = case_inputs("d2")
    x, gamma, beta, dy = (inputs[name] for name in ("x", "gamma", "beta", "dy"))
    gradients = reference.backward(dy, x, gamma, 1e-5)

    def loss(x, gamma, beta):
        return np.sum(reference.forward(x, gamma, beta, 1e-5).y * dy)

    arguments = {"dx": x, "dgamma": gamma, "dbeta": beta}
    for position, (name, argument) in enumerate(arguments.items()):
        step = 1e-6
        for index in np.ndindex(argument.shape):
            shifted = [np.array(a) for a in arguments.values()]
            shifted[position][index] += step
            above = loss(*shifted)
            shifted[position][index] -= 2 * step
            slope = (above - loss(*shifted)) / (2 * step)
            assert abs(slope - getattr(gradients, name)[index]) < 1e-7, (name, index)


def test_update_and_inference():
    x = np.array([[1.0], [3.0]])
    mean, var = reference.update(np.zeros(1), np.ones(1), x, decay=0.9)
    np.testing.assert_allclose([mean, var], [[0.2], [0.9 + 0.1 * 2]])
    y = reference.inference(x, np.array([3.0]), np.array([1.0]), np.ones(1), np.full(1, 4.0), eps=0.0)
    np.testing.assert_allclose(y, [[1.0], [4.0]])


def test_rows_and_back():
    x = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    rows = reference.as_rows(x, axis=1)
    assert rows.shape == (8, 3)
    np.testing.assert_array_equal(rows[:, 1], x[:, 1].ravel())
    np.testing.assert_array_equal(reference.from_rows(rows, x.shape, axis=1), x)
