"""`batchnorm.compat.returnn` against the port of the original, and its contexts, dimensions and masks."""

import asyncio
import contextvars
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from golden import case_inputs, relative_error, results, tolerance

from batchnorm.compat.returnn import BatchNorm, run_ctx

CASES = ("d2", "d3", "d4", "d5", "seq", "ill", "const", "single", "single4")


def named(values, inputs, *, masked=False):
    """A DataArray with the channels along `feature` and, optionally, the lengths of `d1`."""
    dims = [f"d{axis}" for axis in range(values.ndim)]
    dims[int(inputs["channel_axis"])] = "feature"
    source = xr.DataArray(values, dims=dims)
    return source.assign_coords(lengths_of_d1=("d0", inputs["lengths"])) if masked else source


def trained(norm, sources, **options):
    """y of the first source in training, and mean and var after each."""
    ours = {}
    for step, source in enumerate(sources, start=1):
        with run_ctx(train=True):
            y = norm(source, **options)
        ours |= {f"running_mean_{step}": norm.mean.values, f"running_var_{step}": norm.var.values}
        ours.setdefault("y", y.values)
    return ours


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize(("case", "masked"), [*((case, False) for case in CASES), ("seq", True)])
def test_port_of_the_original(case, masked, faithful):
    """`faithful=True` equals the original; by default the initial variance is 1, and gamma and beta are applied."""
    inputs, config = case_inputs(case), "masked_" * masked + ("init0" if faithful else "init_var1")
    theirs = results("returnn_demo_port", "float64", case, config)
    norm, sources = (
        BatchNorm("feature", faithful=faithful),
        [named(x, inputs, masked=masked) for x in inputs["x_steps"]],
    )
    norm.gamma, norm.beta = (xr.DataArray(inputs[name], dims="feature") for name in ("gamma", "beta"))
    ours = {"y_eval_init": norm(sources[0]).values} | trained(norm, sources)
    ours["y_eval_3"] = norm(sources[0]).values
    norm.mean, norm.var = (xr.DataArray(inputs[name], dims="feature") for name in ("rmean0", "rvar0"))
    ours["y_eval_r0"] = norm(sources[0]).values
    assert ours.keys() == theirs.keys() - {"dx"}
    for name, value in ours.items():
        expected = theirs[name]
        if name.startswith("y") and not faithful:
            gamma, beta = (named(np.ones_like(inputs["x"]), inputs) * getattr(norm, n) for n in ("gamma", "beta"))
            expected = expected * gamma.values + beta.values
        assert np.isfinite(value).all(), name
        assert relative_error(value, expected) <= tolerance("returnn_demo_port", "float64", case, name), name


@pytest.mark.parametrize("masked", [True, False])
def test_gradient_of_the_port(masked):
    """Through JAX arrays; the update does not depend on the differentiation."""
    inputs, norm = case_inputs("seq"), BatchNorm("feature", faithful=True)
    theirs = results("returnn_demo_port", "float64", "seq", "masked_init0" if masked else "init0")
    dy = np.where(inputs["mask"][:, :, None], inputs["dy"], 0) if masked else inputs["dy"]

    def loss(x):
        with run_ctx(train=True):
            y = norm(named(x, inputs, masked=masked))
        return (y.data * dy).sum()

    with jax.enable_x64(True):
        dx = jax.grad(loss)(jnp.asarray(inputs["x"]))
        assert relative_error(np.asarray(dx), theirs["dx"]) <= 1e-12
        assert relative_error(norm.mean.values, theirs["running_mean_1"]) <= 1e-12
        assert relative_error(norm.var.values, theirs["running_var_1"]) <= 1e-12


def test_faults_of_the_original():
    source = xr.DataArray([[1.0], [3.0]], dims=("batch", "feature"))
    faithful, mended = BatchNorm(faithful=True), BatchNorm()
    np.testing.assert_allclose(faithful(source).values, source / np.sqrt(1e-5))  # a variance of 0
    np.testing.assert_allclose(mended(source).values, source / np.sqrt(1 + 1e-5))
    for norm in (faithful, mended):
        norm.gamma, norm.beta = norm.gamma * 2, norm.beta + 5
    np.testing.assert_allclose(faithful(source).values, source / np.sqrt(1e-5))  # no gamma, no beta
    np.testing.assert_allclose(mended(source).values, 2 * source / np.sqrt(1 + 1e-5) + 5)


def test_momentum_and_epsilon_of_a_call():
    """Against RETURNN's released layer, which is based on the sketch, with numbers other than the defaults."""
    inputs = case_inputs("seq")
    theirs = results("returnn_rf", "float64", "seq", "mask_mom0.3_eps1e-5")
    norm, sources = BatchNorm(), [named(x, inputs, masked=True) for x in inputs["x_steps"]]
    norm.gamma, norm.beta = (xr.DataArray(inputs[name], dims="feature") for name in ("gamma", "beta"))
    ours = trained(norm, sources, momentum=0.3, epsilon=1e-5)
    ours["y_eval_3"] = norm(sources[0]).values
    for name, value in ours.items():
        assert relative_error(value, theirs[name]) <= tolerance("returnn_rf", "float64", masked=True), name
    default = np.asarray(norm(sources[0]).values)
    assert relative_error(norm(sources[0], epsilon=0.5).values, default) > 0.1


X = np.random.default_rng(4).normal(3.0, 2.0, size=(4, 5, 3))
SOURCE = xr.DataArray(
    X, dims=("batch", "time", "feature"), coords={"feature": ["u", "v", "w"]}, name="x", attrs={"units": "m"}
)


def test_made_at_the_first_call():
    norm = BatchNorm()
    assert (norm.in_dim, norm.mean, norm.gamma) == (None, None, None)
    y = norm(SOURCE.astype("float32"))
    assert norm.in_dim == "feature"
    for name, value in {"mean": 0, "var": 1, "gamma": 1, "beta": 0}.items():
        parameter = getattr(norm, name)
        assert (parameter.dims, parameter.dtype) == (("feature",), "float32")
        np.testing.assert_array_equal(parameter.values, np.full(3, value))
    assert (y.dims, y.dtype, y.name, y.attrs) == (SOURCE.dims, "float32", "x", {"units": "m"})
    xr.testing.assert_equal(y.coords.to_dataset(), SOURCE.coords.to_dataset())
    norm.beta.values[:] = 7  # arrays of their own
    np.testing.assert_array_equal(norm.mean, np.zeros(3))
    without = BatchNorm("time", affine=False)
    without(SOURCE)
    assert (without.gamma, without.beta, without.mean.shape) == (None, None, (5,))


def test_dimensions_are_known_by_name():
    norm, transposed = BatchNorm(), BatchNorm("feature")
    expected, ours = trained(norm, [SOURCE]), trained(transposed, [SOURCE.transpose("feature", "time", "batch")])
    np.testing.assert_allclose(ours["running_mean_1"], expected["running_mean_1"], rtol=1e-14)
    np.testing.assert_allclose(ours["y"], expected["y"].T, rtol=1e-12)
    np.testing.assert_allclose(norm(SOURCE.transpose()).values, norm(SOURCE).values.T, rtol=1e-12)
    numbered = BatchNorm()
    trained(numbered, [xr.DataArray(X, dims=(2, 1, 0))])  # 0 is the name of the last
    np.testing.assert_allclose(numbered.mean, 0.1 * X.mean(axis=(0, 1)), rtol=1e-12)


ANOTHER = "source and mean differ along 'feature'; select the labels in order, or set mean anew"


@pytest.mark.parametrize(("source", "error", "message"), [
    (SOURCE.rename(feature="channel"), ValueError, "the feature dimension is 'feature': rename it"),
    (SOURCE[..., :2], ValueError, ANOTHER),
    (SOURCE.drop_vars("feature")[..., :2], ValueError, ANOTHER),
    (SOURCE[..., ::-1], ValueError, ANOTHER),
    (X, TypeError, r"source is a ndarray; it must be an xarray\.DataArray"),
    (xr.DataArray(1.0), TypeError, "with dimensions"),
    (SOURCE.astype(int), TypeError, "source has dtype int64"),
])  # fmt: skip
def test_another_source_is_refused(source, error, message):
    norm = BatchNorm()
    norm(SOURCE)
    with pytest.raises(error, match=message), run_ctx(train=True):
        norm(source)
    np.testing.assert_array_equal(norm.mean, np.zeros(3))


@pytest.mark.parametrize(("options", "message"), [
    ({"momentum": 1.5}, "momentum is 1.5; it is the weight of the batch"),
    ({"momentum": float("nan")}, "momentum is nan"),
    ({"momentum": None}, "^momentum is None"),
    ({"momentum": "a"}, "^momentum is 'a'"),
    ({"epsilon": -1.0}, "^epsilon is -1.0; it is added to the variance"),
    ({"epsilon": None}, "^epsilon is None"),
])  # fmt: skip
def test_numbers_are_checked(options, message):
    norm = BatchNorm()
    with pytest.raises((ValueError, TypeError), match=message):
        norm(SOURCE, **options)
    assert norm.in_dim is None


def along(*dims, size=3):
    return xr.DataArray(np.full((size,) * len(dims), 2.0), dims=dims)


@pytest.mark.parametrize(("field", "value", "error", "message"), [
    ("mean", along("time"), ValueError, r"^mean has dimensions \('time',\); they must be \('feature',\)"),
    ("var", along("other"), ValueError, r"^var has dimensions \('other',\)"),
    ("mean", along("batch", "feature"), ValueError, r"^mean has dimensions \('batch', 'feature'\)"),
    ("gamma", along("other"), ValueError, r"^gamma has dimensions \('other',\)"),
    ("gamma", along("feature", size=2), ValueError, "^source and gamma differ along 'feature'"),
    ("beta", along("feature").astype(int), TypeError, "^beta has dtype int64"),
    ("mean", np.ones(3), TypeError, r"^mean is a ndarray; it must be an xarray.DataArray: DataArray\(mean, dims="),
    ("gamma", np.ones(3), TypeError, "^gamma is a ndarray"),
    ("mean", along("feature").copy(data=jnp.ones(3)), TypeError, "^mean is a jax.*, but source is a numpy"),
])  # fmt: skip
def test_fields_that_do_not_fit_change_nothing(field, value, error, message):
    """A field of another dimension is not matched by position, and after an error the layer is still unbuilt."""
    norm = BatchNorm()
    setattr(norm, field, value)
    with pytest.raises(error, match=message):
        norm(SOURCE)
    assert norm.in_dim is None
    assert [name for name in ("mean", "var", "gamma", "beta") if getattr(norm, name) is not None] == [field]


def test_outside_of_contexts_it_evaluates():
    norm = BatchNorm()
    np.testing.assert_allclose(norm(SOURCE).values, X / np.sqrt(1 + 1e-5), rtol=1e-14)
    with run_ctx(train=False):
        np.testing.assert_allclose(norm(SOURCE).values, X / np.sqrt(1 + 1e-5), rtol=1e-14)
    np.testing.assert_array_equal(norm.mean, np.zeros(3))
    with pytest.raises(TypeError, match="train is 'no'; it must be True or False"), run_ctx(train="no"):
        pass


def test_updates_wait_for_the_end_and_are_made_in_order():
    norm, other = BatchNorm(), BatchNorm()
    with run_ctx(train=True):
        norm(SOURCE, momentum=0.5)
        other(SOURCE)
        norm(SOURCE + 10, momentum=0.25)
        np.testing.assert_array_equal(norm.mean, np.zeros(3))
        np.testing.assert_array_equal(norm.var, np.ones(3))
    mean, var = X.mean(axis=(0, 1)), X.var(axis=(0, 1))
    np.testing.assert_allclose(norm.mean, 0.75 * (0.5 * mean) + 0.25 * (mean + 10), rtol=1e-12)
    np.testing.assert_allclose(norm.var, 0.75 * (0.5 + 0.5 * var) + 0.25 * var, rtol=1e-12)
    np.testing.assert_allclose(other.mean, 0.1 * mean, rtol=1e-12)
    xr.testing.assert_equal(norm.mean.coords.to_dataset(), SOURCE.coords.to_dataset())


def test_no_update_after_an_exception():
    norm = BatchNorm()

    def fails():
        with run_ctx(train=True):
            norm(SOURCE)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    np.testing.assert_array_equal(norm.mean, np.zeros(3))
    np.testing.assert_allclose(norm(SOURCE).values, X / np.sqrt(1 + 1e-5), rtol=1e-14)  # the flag is off again
    trained(norm, [SOURCE])
    np.testing.assert_allclose(norm.mean, 0.1 * X.mean(axis=(0, 1)), rtol=1e-12)  # a single update


def test_contexts_within_contexts():
    norm, inner = BatchNorm(), BatchNorm()
    with run_ctx(train=True):
        norm(SOURCE)
        with run_ctx(train=False):
            np.testing.assert_allclose(norm(SOURCE).values, X / np.sqrt(1 + 1e-5), rtol=1e-14)
        with run_ctx(train=True):
            inner(SOURCE)
        np.testing.assert_allclose(inner.mean, 0.1 * X.mean(axis=(0, 1)), rtol=1e-12)
        np.testing.assert_array_equal(norm.mean, np.zeros(3))
    np.testing.assert_allclose(norm.mean, 0.1 * X.mean(axis=(0, 1)), rtol=1e-12)


def test_threads_start_outside():
    norm, seen = BatchNorm(), []
    with run_ctx(train=True):
        thread = threading.Thread(target=lambda: seen.append(norm(SOURCE)))
        thread.start()
        thread.join()
    np.testing.assert_allclose(seen[0].values, X / np.sqrt(1 + 1e-5), rtol=1e-14)
    np.testing.assert_array_equal(norm.mean, np.zeros(3))


def test_tasks_and_threads_that_outlive_the_block_do_not_train():
    """Their updates would be lost."""
    norm, outcomes = BatchNorm(), []

    async def started_within():
        async def train():
            await ended.wait()
            norm(SOURCE)

        ended = asyncio.Event()
        with run_ctx(train=True):
            task = asyncio.ensure_future(train())
            norm(SOURCE)
        ended.set()
        await task

    with pytest.raises(RuntimeError, match="trains in a run_ctx block that has ended"):
        asyncio.run(started_within())
    np.testing.assert_allclose(norm.mean, 0.1 * X.mean(axis=(0, 1)), rtol=1e-12)  # of the call in the block
    for train in (True, False):
        with run_ctx(train=train):
            context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: outcomes.append(context.run(outcome, norm)))  # noqa: B023
        thread.start()
        thread.join()
    assert outcomes == ["RuntimeError", "evaluated"]


def outcome(norm):
    try:
        norm(SOURCE)
    except RuntimeError as error:
        return type(error).__name__
    return "evaluated"


def test_lengths_of_two_dimensions():
    """Each length counts along its own dimension; padding enters no statistic, and is normalized too."""
    lengths = {"lengths_of_time": ("batch", [5, 2, 0, 3]), "lengths_of_feature": ("batch", [3, 1, 2, 2])}
    source, norm = SOURCE.assign_coords(lengths), BatchNorm("batch")
    with pytest.raises(ValueError, match="must hold the lengths of another dimension over the remaining ones"):
        norm(source)
    source = SOURCE.assign_coords(lengths_of_time=("batch", [5, 2, 0, 3]), lengths_of_batch=((), 3))
    kept = (np.arange(5) < np.array([5, 2, 0, 3])[:, None]) & (np.arange(4) < 3)[:, None]
    norm = BatchNorm()
    ours = trained(norm, [source.where(kept[:, :, None], 1e6)])
    mean, var = X[kept].mean(axis=0), X[kept].var(axis=0)
    np.testing.assert_allclose(ours["running_mean_1"], 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(ours["running_var_1"], 0.9 + 0.1 * var, rtol=1e-12)
    y = ours["y"]
    np.testing.assert_allclose(y[kept], (X[kept] - mean) / np.sqrt(var + 1e-5), rtol=1e-10)
    np.testing.assert_allclose(
        y[~kept], np.broadcast_to((1e6 - mean) / np.sqrt(var + 1e-5), y[~kept].shape), rtol=1e-10
    )
    assert "lengths_of_time" in norm(source).coords


@pytest.mark.parametrize(("coordinate", "error", "message"), [
    ({"lengths_of_tiem": ("batch", [1, 2, 3, 4])}, ValueError, "'lengths_of_tiem' has dimensions"),
    ({"lengths_of_time": ("time", [1, 2, 3, 4, 5])}, ValueError, "lengths of another dimension"),
    ({"lengths_of_time": ("feature", [1, 2, 3])}, ValueError, "lengths of another dimension"),
    ({"lengths_of_time": ("batch", [1, 2, 3, 6])}, ValueError, "each must lie in 0 to 5, the size of 'time'"),
    ({"lengths_of_time": ("batch", [1, 2, 3, -1])}, ValueError, "each must lie in 0 to 5"),
    ({"lengths_of_time": ("batch", [1.0, 2.0, 3.0, 4.0])}, TypeError, "lengths must be integers"),
])  # fmt: skip
def test_wrong_lengths_are_refused(coordinate, error, message):
    norm = BatchNorm()
    with pytest.raises(error, match=message):
        norm(SOURCE.assign_coords(coordinate))
    assert norm.mean is None


def test_batches_that_do_not_enter():
    norm = BatchNorm()
    trained(norm, [SOURCE])
    before = norm.mean.values, norm.var.values
    trained(norm, [SOURCE.assign_coords(lengths_of_time=("batch", [0, 0, 0, 0]))])
    with pytest.warns(RuntimeWarning, match="did not enter the running statistics") as caught:
        trained(norm, [SOURCE.where(SOURCE.time > 0, np.nan)])
    assert [warning.filename for warning in caught] == [__file__]
    np.testing.assert_array_equal(norm.mean, before[0])
    np.testing.assert_array_equal(norm.var, before[1])


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("masked", [False, True])
def test_faithful_batch_that_is_not_finite(masked, library):
    """Unmasked NaN stays in mean and var; each call makes its own update at the end of the block."""
    values = X.astype(np.float32)
    values[0, 1, 0], values[1, 0, 1], values[3, 4, 2] = np.nan, np.inf, np.nan
    lengths = [5, 2, 0, 3] if masked else [5, 5, 5, 5]
    bad, good = (SOURCE.copy(data=library.asarray(data)) for data in (values, X.astype(np.float32)))
    bad = bad.assign_coords(lengths_of_time=("batch", lengths)) if masked else bad
    norm, kept = BatchNorm(faithful=True), np.arange(5) < np.array(lengths)[:, None]
    with np.errstate(invalid="ignore"), run_ctx(train=True):
        norm(bad)
        norm(good)
        np.testing.assert_array_equal(norm.mean, np.zeros(3))
    # Where the mean became infinite, the difference of infinities in the next update is NaN.
    for moving, statistic in ((norm.mean, np.mean), (norm.var, np.var)):
        first = 0.1 * statistic(values[kept][:, 2]) if masked else np.nan
        expected = 0.9 * np.array([np.nan, np.nan, first]) + 0.1 * statistic(X, axis=(0, 1))
        np.testing.assert_allclose(moving, expected, rtol=1e-5)
    trained(norm, [good])
    np.testing.assert_array_equal(np.isfinite(norm.mean), [False, False, masked])
    before = norm.mean.values
    trained(norm, [good.assign_coords(lengths_of_time=("batch", [0, 0, 0, 0]))])  # nothing to average
    np.testing.assert_array_equal(norm.mean, before)


def test_state_keeps_no_traced_values():
    source, norm = SOURCE.copy(data=jnp.asarray(X)), BatchNorm()

    @jax.jit
    def evaluate(values):
        return norm(source.copy(data=values)).data

    @jax.jit
    def train(values):
        with run_ctx(train=True):
            return norm(source.copy(data=values)).data

    with pytest.raises(RuntimeError, match="traced or transformed; call the layer once outside of it"):
        evaluate(source.data)
    trained(norm, [source])
    mean = norm.mean.values
    np.testing.assert_allclose(evaluate(source.data), norm(source).data, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="mean and var cannot be updated in a function that is being traced"):
        train(source.data)
    np.testing.assert_array_equal(norm.mean.values, mean)


def test_without_xarray_the_extra_is_named():
    code = "import sys; sys.modules['xarray'] = None; import batchnorm.compat.returnn"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert (
        'batchnorm.compat.returnn needs xarray, which is not installed; pip install "batchnorm[named]"' in result.stderr
    )
