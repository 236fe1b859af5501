"""The programs behind the golden arrays compute what is stored; the others need systems that are not installed here."""

import importlib
import sys

import jax
import numpy as np
import pytest
import torch
from golden import FOLDER, load, results

GENERATE = FOLDER / "generate"
#: Largest difference over the largest entry. On the processor of the stored arrays it is 0; others sum in other orders.
TOLERANCES = {"f64": 1e-14, "f32": 1e-5}
INITIAL_FLOAT32 = 2e-7  # Flax's initial state is float32, and XLA's rsqrt of that type depends on the processor


class Generators:
    """Access to the scripts of the folder, and the comparison of what they compute."""

    def configuration(self, script, case, config):
        """The script's module, and its arguments of one configuration."""
        module = importlib.import_module(script)
        options = {(name, label): options for name, label, options in module.CONFIGS}
        return module, options[case, config]

    def case(self, name, dtype="f64"):
        return importlib.import_module("archive").Case(name, dtype)

    def difference(self, ours, stored):
        """Relative to the largest entry; infinite if shapes, types, or the places of NaN and Inf differ."""
        return importlib.import_module("compare").difference(np.asarray(ours), stored)

    def assert_reproduces(self, ours, stored, dtype="f64", **exceptions):
        """The same names, and the same arrays up to rounding."""
        assert ours.keys() == stored.keys()
        for name, value in ours.items():
            assert self.difference(value, stored[name]) <= exceptions.get(name, TOLERANCES[dtype]), name


@pytest.fixture
def generators(monkeypatch):
    """The scripts import each other as if run from their folder; afterwards none of their names is left."""
    monkeypatch.syspath_prepend(str(GENERATE))
    before = set(sys.modules)
    yield Generators()
    for name in set(sys.modules) - before:
        if str(GENERATE) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def one_thread():
    """The stored arrays of torch are of one thread: its sums over rows have a part for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored_results(system, case, config, dtype="f64"):
    return results(system, {"f64": "float64", "f32": "float32"}[dtype], case, config)


def run_torch(generators, case, config, dtype, **changes):
    module, options = generators.configuration("run_torch", case, config)
    layer = module.Layer(generators.case(case, dtype), **options | changes)
    layer.module.eval()
    return {"y_eval_init": layer.call(layer.x_steps[0])} | module.train(layer) | module.evaluate(layer)


def test_inputs(generators):
    ours, stored = importlib.import_module("make_inputs").make(), load("inputs")
    assert ours.keys() == stored.keys() - {"_meta"}
    for name, value in ours.items():
        assert value.dtype == stored[name].dtype
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize(("case", "config"), [
    ("d2", "default"), ("d5", "default"), ("seq", "default"), ("d4", "channels_last"), ("d4", "mom0.3_eps1e-3"),
])  # fmt: skip
def test_torch(generators, case, config, dtype):
    ours = run_torch(generators, case, config, dtype)
    generators.assert_reproduces(ours, stored_results("torch", case, config, dtype), dtype)


@pytest.mark.usefixtures("one_thread")
def test_another_argument_is_noticed(generators):
    stored = stored_results("torch", "d4", "default", "f32")
    for changes, name in (({"eps": 2e-5}, "y"), ({"momentum": 0.11}, "running_mean_1")):
        ours = run_torch(generators, "d4", "default", "f32", **changes)
        with pytest.raises(AssertionError, match=name):
            generators.assert_reproduces({name: ours[name]}, {name: stored[name]}, "f32")


def test_difference_in_kind_is_noticed(generators):
    stored = np.array([1.0, np.nan, -np.inf])
    assert generators.difference(stored.copy(), stored) == 0
    assert generators.difference(np.array([1.5, np.nan, -np.inf]), stored) == 0.5
    for other in ([1, 1, -np.inf], [np.nan, np.nan, -np.inf], [1, np.nan, np.inf], [1, np.nan]):
        assert generators.difference(np.array(other, float), stored) == np.inf
    assert generators.difference(stored.astype(np.float32), stored) == np.inf


@pytest.mark.parametrize(("case", "config"), [("d2", "default"), ("d4", "slow_var"), ("seq", "mask_pad1e6")])
def test_flax_linen(generators, case, config):
    module, options = generators.configuration("run_flax_linen", case, config)
    with jax.enable_x64(True):
        ours = module.compute(generators.case(case), **options)
    stored = stored_results("flax_linen", case, config)
    generators.assert_reproduces(ours, stored, y_eval_init=INITIAL_FLOAT32)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")  # its float32 state
@pytest.mark.parametrize(("case", "config"), [("d2", "default"), ("d4", "mom0.9_eps1e-3"), ("seq", "mask")])
def test_flax_nnx(generators, case, config):
    module, options = generators.configuration("run_flax_nnx", case, config)
    with jax.enable_x64(True):
        ours = module.compute(generators.case(case), **options)
    of_float32 = {name for name in ours if name.startswith("running_") or "eval" in name}
    stored = stored_results("flax_nnx", case, config)
    generators.assert_reproduces(ours, stored, **dict.fromkeys(of_float32, INITIAL_FLOAT32))


@pytest.mark.parametrize(("case", "config", "options"), [
    ("d2", "init0", {"var_init": 0}), ("d4", "init_var1", {"var_init": 1}),
    ("seq", "masked_init0", {"var_init": 0, "masked": True}),
])  # fmt: skip
def test_returnn_demo_port(generators, case, config, options):
    ours = importlib.import_module("run_returnn_demo_port").compute(generators.case(case), **options)
    generators.assert_reproduces(ours, stored_results("returnn_demo_port", case, config))


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize(("case", "config"), [("d3", "default"), ("seq", "default"), ("d2", "tanh"), ("d4", "eps1e-2")])
def test_port_of_zygote(generators, case, config, dtype):
    """Without Julia, its port to NumPy: the same cases, configurations and names."""
    module = importlib.import_module("run_zygote")
    ours = module.port(generators.case(case, dtype), *module.CONFIGS[config])
    if config != "default":
        ours = {name: value for name, value in ours.items() if name not in module.ONLY_DEFAULT}
    generators.assert_reproduces(ours, stored_results("zygote", case, config, dtype), dtype)


@pytest.mark.parametrize(("case", "eps", "masked"), [
    ("d2", "1e-5", False), ("seq", "1e-3", True), ("ill", "0", False), ("single", "0", False),
])  # fmt: skip
def test_exact(generators, case, eps, masked):
    ours = importlib.import_module("run_exact").compute(generators.case(case), eps, masked)
    prefix = f"exact/{case}/{'masked_' if masked else ''}eps{eps}/"
    stored = {key.removeprefix(prefix): value for key, value in load("exact").items() if key.startswith(prefix)}
    assert ours.keys() == stored.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)
