"""Every convention against arrays computed by the system that it reproduces."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from golden import Replay, case_inputs, load, relative_error, results, tolerance
from libraries import LIBRARIES

import batchnorm as bn
from batchnorm.convention import Convention, Names

NORMAL = ("d2", "d3", "d4", "d5", "seq")
ILL, CONST, SINGLE = ("ill",), ("const",), ("single", "single4")
EPS_FLOAT32 = float(np.float32(1e-5))

# Systems whose records are not shipped; each alone has the value of some field.
HAIKU = Convention(name="haiku", source="", eps=1e-5, decay=0.9, debias="adam", initial_spread=0.0)
EQUINOX_BATCH = Convention(name="equinox-batch", source="", eps=1e-5, decay=0.99, debias="adam", initial_spread=1.0)
EQUINOX_EMA = Convention(
    name="equinox-ema",
    source="",
    eps=1e-5,
    decay=0.99,
    debias="first_batch",
    initial_spread=0.0,
    normalize_with="running",
)
LASAGNE_UPSTREAM = Convention(
    name="lasagne", source="", eps=1e-4, eps_eval="absent", tracked="rstd", decay=0.9, names=Names("", "", "", "")
)
PADDLE = Convention(name="paddle", source="", eps=EPS_FLOAT32, decay=float(np.float32(0.9)), single="identity")
RETURNN_11 = replace(bn.CONVENTIONS["returnn"], name="returnn-tf-11", decay=0.01, update="always", running_correction=0)


@dataclass(frozen=True)
class Run:
    """One configuration of one system, and the arguments of `batch_norm` that reproduce it."""

    system: str
    convention: str | Convention
    config: str
    cases: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("float64", "float32")
    affine: bool = True
    mask: bool = False  # by lengths; the systems' gradients are of a dy that is 0 on padding
    padded: bool = False  # the same dy, without the mask
    skip: tuple[str, ...] = ()  # results of another call than the one of that name here


def cumulative(name: str) -> Convention:
    return replace(bn.CONVENTIONS[name], decay=None)


F64, F32 = ("float64",), ("float32",)
RUNS = [
    Run("lasagne_theano105_py37", "lasagne-gist", "default", ("d2", "d3", "d4", "d5", *ILL, *CONST, *SINGLE)),
    Run("lasagne_theano105_py37", "lasagne-gist", "default", ("seq",), {"axis": 1}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes0_int", ("d2",), {"axis": 1}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_0tuple", ("d2",), {"axis": 1}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_01", ("d2",), {"axis": ()}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_1", ("d2",), {"axis": 0}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_0", ("d4",), {"axis": (1, 2, 3)}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_01", ("d4",), {"axis": (2, 3)}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_023", ("d4",), {"axis": 1}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_0123", ("d4",), {"axis": ()}),
    Run("lasagne_theano105_py37", "lasagne-gist", "axes_01", ("seq",), {"axis": 2}),
    Run("lasagne_theano105_py37", "lasagne-gist", "eps1e-4_alpha0.1", ("d2",), {"eps": 1e-4, "decay": 0.9}),
    Run("lasagne_theano105_py37", "lasagne-gist", "eps0_alpha1", ("d2",), {"eps": 0.0, "decay": 0.0}),
    Run("lasagne_theano105_py37", "lasagne-gist", "rectify", ("d2",), {"activation": "relu"}),
    Run("lasagne_theano105_py37", "lasagne-gist", "tanh", ("d2",), {"activation": "tanh"}),
    Run(
        "lasagne_theano105_py37",
        "lasagne-gist",
        "eps1e-5_alpha0.9_rectify",
        ("d4",),
        {"eps": 1e-5, "decay": 0.1, "activation": "relu"},
    ),
    Run("lasagne_theano105_py37", "lasagne-gist", "eps1e-4", ILL, {"eps": 1e-4}),
    Run("lasagne_theano105_py37", "lasagne-gist", "eps0", ILL, {"eps": 0.0}),
    Run("lasagne_theano082_py27", "lasagne-gist", "default", ("d2", "d3", "d5"), dtypes=F64),
    Run("lasagne_theano082_py27", "lasagne-gist", "default", ("seq",), {"axis": 1}, dtypes=F64),
    Run("cs231n", "cs231n", "default", (*NORMAL, *ILL, *CONST, *SINGLE)),
    Run("cs231n", "cs231n", "eps1e-3_mom0.5", ("d2", "d4"), {"eps": 1e-3, "decay": 0.5}),
    Run("cs231n", "cs231n", "eps0", ILL, {"eps": 0.0}),
    Run("d2l", "d2l", "default", ("d2", *ILL, *CONST, "single")),
    Run("d2l", "d2l", "func_nchw", ("d4", "single4"), {"axis": 1}),
    Run("d2l", "d2l", "func_eps1e-3_mom0.5", ("d2",), {"eps": 1e-3, "decay": 0.5}),
    Run("d2l", "d2l", "func_eps0", ILL, {"eps": 0.0}),
    Run("returnn_demo_port", "returnn-common-demo", "init0", (*NORMAL, *ILL, *CONST, *SINGLE), dtypes=F64),
    Run(
        "returnn_demo_port",
        replace(bn.CONVENTIONS["returnn-common-demo"], initial_spread=1.0),
        "init_var1",
        (*NORMAL, *ILL, *CONST, *SINGLE),
        dtypes=F64,
    ),
    Run("returnn_demo_port", "returnn-common-demo", "masked_init0", ("seq",), dtypes=F64, mask=True),
    Run(
        "returnn_demo_port",
        replace(bn.CONVENTIONS["returnn-common-demo"], initial_spread=1.0),
        "masked_init_var1",
        ("seq",),
        dtypes=F64,
        mask=True,
    ),
    Run("torch", "pytorch", "default", (*NORMAL, *ILL, *CONST, *SINGLE)),
    Run("torch", "pytorch", "channels_last", ("d4",)),
    Run("torch", "pytorch", "mom0.3_eps1e-3", ("d2", "d4"), {"decay": 0.7, "eps": 1e-3}),
    Run("torch", cumulative("pytorch"), "mom_none", ("d2", "d4"), dtypes=F64),
    Run(
        "torch",
        "pytorch",
        "no_track",
        ("d2", "d4"),
        dtypes=F64,
        skip=("y_eval_init", "y_eval_3", "dx_eval_3", "dgamma_eval_3", "dbeta_eval_3"),
    ),
    Run("torch", "pytorch", "no_affine", ("d2", "d4"), dtypes=F64, affine=False),
    Run("torch", "pytorch", "eps0", ILL, {"eps": 0.0}, dtypes=F64),
    Run("flax_linen", "flax", "default", (*NORMAL, *CONST, *SINGLE)),
    Run("flax_linen", "flax", "slow_var", ("d4", *ILL, *CONST)),
    Run("flax_linen", "flax", "axis1", ("d4",), {"axis": 1}),
    Run("flax_linen", "flax", "mom0.9_eps1e-3", ("d2", "d4"), {"decay": 0.9, "eps": 1e-3}),
    Run("flax_linen", "flax", "no_scale_bias", ("d2",), affine=False),
    Run("flax_linen", "flax", "mask", ("seq",), mask=True),
    Run("flax_linen", "flax", "mask_slow_var", ("seq",), mask=True),
    Run("flax_nnx", "flax", "default", (*NORMAL, *CONST, *SINGLE), dtypes=F64),
    Run("flax_nnx", "flax", "default", ("d2", "d4", "seq", *CONST), dtypes=F32),
    Run("flax_nnx", "flax", "mask", ("seq",), mask=True),
    Run("keras3_jax", "keras", "default", (*NORMAL, *CONST, *SINGLE)),
    Run("keras3_jax", "keras", "mom0.9_eps1e-5", ("d4",), {"decay": 0.9, "eps": 1e-5}),
    Run("keras3_jax", "keras", "axis1", ("d4",), {"axis": 1}),
    Run("keras3_jax", "keras", "mask", ("seq",), mask=True),
    Run("tensorflow", "tensorflow-fused", "fused_default", (*NORMAL, *CONST, *SINGLE), {"decay": 0.9}, dtypes=F32),
    Run("tensorflow", "tensorflow-fused", "fused_factor1", ("d4",), dtypes=F32),
    Run("tensorflow", "tensorflow-fused", "fused_nchw", ("d4",), {"decay": 0.9, "axis": 1}, dtypes=F32),
    Run(
        "tensorflow",
        "tensorflow-fused",
        "fused_eps1e-5_mom0.3",
        ("d2", "d4", *CONST),
        {"eps": 1e-5, "decay": 0.7},
        dtypes=F32,
    ),
    Run("tensorflow", "tensorflow-fused", "fused_eps0", ("d2", "d4"), {"eps": 0.0, "decay": 0.9}, dtypes=F32),
    Run("returnn_rf", "returnn", "default", ("d2", "d3", "d4", "d5", *ILL, *CONST, *SINGLE)),
    Run("returnn_rf", "returnn", "nomask", ("seq",), padded=True),
    Run("returnn_rf", "returnn", "mom0.3_eps1e-5", ("d2", "d4"), {"decay": 0.7, "eps": 1e-5}, dtypes=F64),
    Run(
        "returnn_rf", "returnn", "nomask_mom0.3_eps1e-5", ("seq",), {"decay": 0.7, "eps": 1e-5}, dtypes=F64, padded=True
    ),
    Run("returnn_rf", "returnn", "noaffine", ("d2", "d4"), dtypes=F64, affine=False),
    Run("returnn_rf", "returnn", "mask", ("seq",), mask=True),
    Run("returnn_rf", "returnn", "mask_default_arg", ("seq",), dtypes=F64, mask=True),
    Run("returnn_rf", "returnn", "mask_mom0.3_eps1e-5", ("seq",), {"decay": 0.7, "eps": 1e-5}, dtypes=F64, mask=True),
    Run("returnn_rf", "returnn", "mask_noaffine", ("seq",), dtypes=F64, affine=False, mask=True),
    Run("returnn_rf", "returnn", "mask_fulllen", ("seq",), {"lengths": [7] * 5}, dtypes=F64),
    Run("returnn_tf", "returnn", "bv16_default", ("d2", "d4"), dtypes=F32),
    Run("returnn_tf", "returnn", "bv16_masked_time_False", ("seq",), dtypes=F32, padded=True),
    Run("returnn_tf", "returnn", "bv16_masked_time_True", ("seq",), dtypes=F32, mask=True),
    Run("returnn_tf", RETURNN_11, "bv11_default", ("d2", "d4"), dtypes=F32),
    Run("returnn_tf", RETURNN_11, "bv11_masked_time_False", ("seq",), dtypes=F32, padded=True),
    Run("returnn_tf", RETURNN_11, "bv11_masked_time_True", ("seq",), dtypes=F32, mask=True),
    Run("lasagne_upstream_02dev", LASAGNE_UPSTREAM, "default", ("d2", "d3", "d4", "d5", *ILL, *CONST, "single")),
    Run("lasagne_upstream_02dev", LASAGNE_UPSTREAM, "eps1e-5_alpha0.5", ("d4",), {"eps": 1e-5, "decay": 0.5}),
    Run("lasagne_upstream_02dev", LASAGNE_UPSTREAM, "axes_01", ("seq",)),
    Run("haiku", HAIKU, "default", (*NORMAL, *CONST, *SINGLE)),
    Run("haiku", HAIKU, "decay0.99_eps1e-3", ("d4",), {"decay": 0.99, "eps": 1e-3}),
    Run("equinox", EQUINOX_BATCH, "batch", ("d2", "d3", "d4", "seq", *ILL, *CONST, *SINGLE)),
    Run("equinox", EQUINOX_BATCH, "batch_mom0.9_eps1e-3", ("d4",), {"decay": 0.9, "eps": 1e-3}),
    Run("equinox", EQUINOX_EMA, "ema", ("d2", "d3", "d4", "seq", *ILL, *CONST, *SINGLE)),
    Run("equinox", EQUINOX_EMA, "ema_mom0.9_eps1e-3", ("d4",), {"decay": 0.9, "eps": 1e-3}),
    Run("paddle", PADDLE, "default", (*NORMAL, *ILL, *CONST, *SINGLE)),
    Run("paddle", PADDLE, "no_affine", ("d4",), dtypes=F64, affine=False),
]

JAX_CONFIGS = ("default", "init0", "mask", "masked_init0", "fused_default", "batch", "ema", "axes_01")


GRADIENTS = ("dx", "dgamma", "dbeta")
#: Inputs, counters, and results of other calls; test_golden_origins and test_golden_limits treat those that matter.
NOT_REPLAYED = (
    "gamma", "beta", "moving_", "num_batches_tracked", "counter_", "output_is_time_major", "y_eval_local_stats",
    "running_mean_after_plain_run", "y_fulldy", "dx_fulldy", "dgamma_fulldy", "dbeta_fulldy",
)  # fmt: skip


def cells():
    for run in RUNS:
        for case in run.cases:
            for dtype in run.dtypes:
                if case == "ill" and dtype == "float32":
                    continue  # 2 to 5 % off in every system; held to exact.npz in test_accuracy
                for library in ("numpy", "torch", "jax"):
                    if library == "jax" and (case not in ("d2", "seq", "const") or run.config not in JAX_CONFIGS):
                        continue  # the same code, at the cost of some seconds of compilation for each shape
                    label = f"{run.system}-{case}-{run.config}-{dtype}-{library}"
                    yield pytest.param(run, case, dtype, LIBRARIES[library], id=label)


@pytest.mark.parametrize(("run", "case", "dtype", "library"), list(cells()))
def test_convention_reproduces_system(run, case, dtype, library):
    theirs = results(run.system, dtype, case, run.config)
    inputs = case_inputs(case)
    for name in ("gamma", "beta"):
        if name in theirs:  # the shapes of unusual axes
            inputs[name] = theirs[name].squeeze(tuple(a for a, n in enumerate(theirs[name].shape) if n == 1))
    options = dict(run.options)
    if run.mask:
        options["lengths"] = inputs["lengths"]
    if "axis" in options and options["axis"] != ():
        inputs |= {n: np.reshape(inputs[n], stat_shape(inputs["x"], options["axis"])) for n in ("gamma", "beta")}
    dy_mask = inputs["mask"][:, :, None] if run.mask or run.padded else None
    with library.context(dtype):
        replay = Replay(library, dtype, inputs, run.convention, affine=run.affine, dy_mask=dy_mask, **options)
        ours = replay.run(names=set(theirs) - set(run.skip))
    left_out = {name for name in set(theirs) - set(ours) - set(run.skip) if not name.startswith(NOT_REPLAYED)}
    assert library.differentiates or all(name.startswith(GRADIENTS) for name in left_out)
    assert not library.differentiates or not left_out
    for name, value in ours.items():
        is_infinite = np.isinf(theirs[name]).reshape(np.shape(value))  # a division by a running deviation of 0
        assert (np.isfinite(value) | is_infinite & (value == theirs[name].reshape(np.shape(value)))).all(), name
        bound = tolerance(run.system, dtype, case, name, masked=run.config.startswith("mask"))
        assert relative_error(value, theirs[name]) <= bound, name


def stat_shape(x, axis):
    return tuple(x.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))


def test_a_wrong_record_fails():
    """The oracle can fail: one field changed is far outside every tolerance."""
    for field_name, value in {"decay": 0.8, "running_correction": 0, "eps": 2e-5, "eps_eval": "outside"}.items():
        wrong = replace(bn.CONVENTIONS["pytorch"], **{field_name: value})
        theirs = results("torch", "float64", "d2", "default")
        ours = Replay(LIBRARIES["numpy"], "float64", case_inputs("d2"), wrong).run(names=set(theirs))
        assert max(relative_error(ours[name], theirs[name]) for name in ours) > 1e-7, field_name


def test_pytorch_counts_batches():
    theirs = results("torch", "float64", "d4", "default")
    running = None
    for x in case_inputs("d4")["x_steps"]:
        _, running = bn.batch_norm(x, running=running)
    assert running.steps == theirs["num_batches_tracked_3"] == 3


def test_equinox_ema_trains_on_its_average():
    """From the second step on its training output is normalized by the average, not by the batch."""
    theirs = results("equinox", "float64", "d4", "ema")
    ours = Replay(LIBRARIES["numpy"], "float64", case_inputs("d4"), EQUINOX_EMA).run(names=set(theirs))
    batch = Replay(LIBRARIES["numpy"], "float64", case_inputs("d4"), EQUINOX_BATCH).run(names=set(theirs))
    for name in ("y_step2", "y_step3"):
        assert relative_error(ours[name], theirs[name]) <= 1e-12
        assert relative_error(batch[name], theirs[name]) > 1e-3


def test_every_shipped_convention_is_proven():
    proven = {run.convention if isinstance(run.convention, str) else run.convention.name for run in RUNS}
    assert set(bn.CONVENTIONS) <= proven | {"zygote-gist"}
    assert all(load(run.system) for run in RUNS)
