"""Selection of the kernel: by name, automatically, and by environment variable."""

import json
import os
import subprocess
import sys

import array_api_strict
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import as_longdouble, check_gradients, check_within, check_y, expected

import batchnorm as bn
from batchnorm import _native
from batchnorm.kernels import generic, registry
from batchnorm.kernels.jax.kernel import KERNEL as JAX
from batchnorm.kernels.native import KERNEL as NUMPY
from batchnorm.kernels.torch.kernel import KERNEL as TORCH
from batchnorm.spec import Operands, spec_of

X, DY = np.random.default_rng(13).normal(size=(2, 9, 3)).astype(np.float32)


def converted(convert):
    return lambda: ((convert(X),), {})


def with_option(**options):
    return lambda: ((X,), options)


#: Calls that the kernels do not support, and the reason in the error.
NOT_SERVED = {
    "empty array of JAX": (converted(lambda x: jnp.asarray(x[:0])), "x has no elements"),
    "strict": (converted(array_api_strict.asarray), "it cannot read arrays of array_api_strict"),
    "callable": (with_option(activation=np.tanh), "a callable activation needs the generic implementation"),
    "byte order": (converted(lambda x: x.astype(">f4")), "foreign byte order"),
    "byte order of gamma": (lambda: ((X, np.ones(3, ">f8")), {}), "foreign byte order"),
    "residual of another type": (with_option(residual=X.astype(np.float64)), "differ in dtype"),
    "axes apart": (lambda: ((X.reshape(3, 3, 3, 1),), {"axis": (0, 1, 3)}), "not next to each other"),
    "tensor on another device": (converted(lambda x: torch.zeros(9, 3, device="meta")), "device meta"),
    "subclass of tensors": (
        converted(lambda x: torch.tensor(x).as_subclass(type("Mine", (torch.Tensor,), {}))),
        "a Mine is not a plain tensor",
    ),
}


def plain(values):
    return values._array if hasattr(values, "_array") else values


@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served(name):
    """An explicit choice raises and says why; the automatic one falls back and is right."""
    make, reason = NOT_SERVED[name]
    arguments, options = make()
    with pytest.raises(ValueError, match=f"kernel 'native' does not serve this call: .*{reason}.*; pass kernel=None"):
        bn.forward(*arguments, kernel="native", **options)
    if name == "tensor on another device":
        return
    y, _ = bn.forward(*arguments, **options)
    by_name, _ = bn.forward(*arguments, kernel="agnostic", **options)
    np.testing.assert_array_equal(as_longdouble(plain(y)), as_longdouble(plain(by_name)))
    activation = "tanh" if callable(options.get("activation")) else None
    x = np.asarray(plain(arguments[0]))
    exact = expected(x, axis=options.get("axis", 1), residual=options.get("residual"), activation=activation)
    check_within("y", plain(y), exact.y, 2e-6 * exact.unit)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dy_of_another_type_than_x(dtype):
    dy = DY.astype(dtype)
    gradients = bn.backward(dy, bn.forward(X, np.ones(3, np.float32))[1])
    check_gradients(gradients, expected(X, dy, np.ones(3)), "float32")


@pytest.mark.parametrize("arrays", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("options", [
    {}, {"activation": "gelu"}, {"convention": "lasagne-gist"}, {"masked_output": "normalized", "masked": True},
    {"training": False}, {"convention": "flax", "axis": 1, "masked": True},
], ids=str)  # fmt: skip
def test_agnostic_agrees_with_native(arrays, options):
    options = dict(options)
    x, gamma, residual = arrays(X), arrays(X[0]), arrays(DY)
    if options.pop("masked", False):
        options["mask"] = arrays(np.arange(9)[:, None] % 4 != 1)
    running = bn.RunningStatistics.initial(3, options.get("convention", "pytorch"), like=x)
    results = [
        bn.batch_norm(x, gamma, gamma, running, residual=residual, kernel=kernel, **options)
        for kernel in ("native", "agnostic", None)
    ]
    for y, state in results[1:]:
        np.testing.assert_allclose(results[0][0], y, atol=2e-6)
        for ours, theirs in zip(results[0][1], state, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_array_equal(results[2][0], results[0][0])


def test_the_best_kernel_by_the_type_of_x():
    spec = spec_of("pytorch", 1, 2)
    for x, kernel in ((X, NUMPY), (torch.tensor(X), TORCH), (jnp.asarray(X), JAX)):
        assert registry.select(None, spec, Operands(x)) is kernel
        assert registry.select("agnostic", spec, Operands(x)) is generic
    assert registry.select("native", spec, Operands(X)) is NUMPY


def test_unknown_kernel():
    with pytest.raises(ValueError, match="no kernel is called 'cuda'; known are native, agnostic, or None"):
        bn.forward(X, kernel="cuda")


# ---- BATCHNORM_INSTRUCTION_SET ---------------------------------------------------------------------------------


def in_a_process_with(instruction_set):
    program = (
        "import json, warnings\nwarnings.simplefilter('error')\nimport numpy as np, batchnorm as bn\n"
        "from batchnorm import _native\n"
        "y, _ = bn.forward(np.arange(12, dtype=np.float32).reshape(4, 3), kernel='native')\n"
        "print(json.dumps([_native.instruction_set(), y.tolist()]))"
    )
    environment = {**os.environ, "BATCHNORM_INSTRUCTION_SET": instruction_set}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", ["", *_native.instruction_sets()])
def test_instruction_set_by_environment(name):
    result = in_a_process_with(name)
    used, y = json.loads(result.stdout)
    assert used == (name or _native.instruction_sets()[0])
    exact = expected(np.arange(12.0, dtype=np.float32).reshape(4, 3))
    check_y(np.array(y, np.float32), exact, "float32")


def test_unknown_instruction_set_by_environment():
    """Every way to request the kernels raises a clear error."""
    result = in_a_process_with("sse9")
    assert result.returncode == 1
    assert "the instruction set sse9 is not one of" in result.stderr
    for name in _native.instruction_sets():
        assert name in result.stderr


def test_every_instruction_set_of_this_machine_is_compiled_in():
    names = _native.instruction_sets()
    assert names[-1] == "baseline"
    flags = set()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    assert ("avx2" in names) == {"avx2", "fma", "f16c"}.issubset(flags)
    assert ("avx512" in names) == {"avx512f", "avx512bw", "avx512dq", "avx512vl"}.issubset(flags)
