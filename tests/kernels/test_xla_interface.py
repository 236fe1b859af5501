"""The declarations of XLA's foreign function interface match XLA's own header, and each call is checked."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchnorm import _native
from batchnorm.kernels.jax import kernel as jax_kernel

CPP = Path(__file__).parents[2] / "cpp"
HEADER = Path("xla", "ffi", "api", "c_api.h")


def compiled(include):
    """The compiler's errors over cpp/tests/xla_abi.cpp, with the header in a folder."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{CPP}", f"-I{include}", str(CPP / "tests" / "xla_abi.cpp")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stderr


def test_declarations_are_those_of_the_installed_header():
    assert compiled(jax.ffi.include_dir()) == ""


@pytest.mark.parametrize(("old", "new"), [
    ("  void* data;\n  int64_t rank;", "  int64_t rank;\n  void* data;"),
    ("XLA_FFI_DataType_BF16 = 16", "XLA_FFI_DataType_BF16 = 34"),
    ("  XLA_FFI_ExecutionStage stage;\n  XLA_FFI_Args args;", "  XLA_FFI_Args args;\n  XLA_FFI_ExecutionStage stage;"),
    ("  _XLA_FFI_API_STRUCT_FIELD(XLA_FFI_Stream_Get);\n", ""),
    ("#define XLA_FFI_API_MAJOR 0", "#define XLA_FFI_API_MAJOR 1"),
], ids=["order", "number", "frame", "function", "version"])  # fmt: skip
def test_another_header_is_noticed(tmp_path, old, new):
    text = Path(jax.ffi.include_dir(), HEADER).read_text()
    assert text.count(old) == 1
    (tmp_path / HEADER).parent.mkdir(parents=True)
    (tmp_path / HEADER).write_text(text.replace(old, new))
    assert "static assertion failed" in compiled(tmp_path)


# ---- calls as XLA makes them --------------------------------------------------------------------------------------

WORD = 8


class Call:
    """A call frame without operands, in words; a target tells its errors to `messages`."""

    def __init__(self, *, frame_bytes=0, args_bytes=40, api_bytes=1 << 10, major=0, stage=3):
        self.messages = []
        create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(self.create_error)
        self.api = (ctypes.c_int64 * 32)(api_bytes, 0, 24, 0, major, 0, ctypes.cast(create, ctypes.c_void_p).value)
        args, rets, attrs = [args_bytes, 0, 0, 0, 0], [40, 0, 0, 0, 0], [48, 0, 0, 0, 0, 0]
        words = [0, 0, ctypes.addressof(self.api), 0, stage, *args, *rets, *attrs]
        self.frame = (ctypes.c_int64 * len(words))(*words)
        self.frame[0] = frame_bytes or WORD * len(words)
        self.alive = create

    def create_error(self, arguments):
        words = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_int64))
        assert words[0] == 28  # up to its code, without the padding
        message = ctypes.cast(words[2], ctypes.c_char_p).value.decode()
        self.messages.append((ctypes.cast(arguments + 24, ctypes.POINTER(ctypes.c_int32))[0], message))
        return 1

    def run(self, target="batchnorm_forward"):
        """Whether the target returned an error."""
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = pointer(_native.xla_targets()[target], None)
        return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)(ctypes.addressof(self.frame)) is not None


@pytest.mark.parametrize("target", ["batchnorm_forward", "batchnorm_backward", "batchnorm_advance"])
def test_version_that_a_target_reports(target):
    metadata = (ctypes.c_int64 * 6)(36, 0, 0, 0, -1, -1)
    extension = (ctypes.c_int64 * 4)(32, 1, 0, ctypes.addressof(metadata))
    call = Call()
    call.frame[1] = ctypes.addressof(extension)
    assert not call.run(target)
    assert call.messages == []
    size, major_and_minor, traits, state = metadata[1], metadata[3], metadata[4] & 0xFFFFFFFF, metadata[5]
    assert (size, traits, state) == (24, 0, 0)
    assert (major_and_minor & 0xFFFFFFFF, major_and_minor >> 32) == _native.xla_version


@pytest.mark.parametrize("options", [
    {"frame_bytes": 160}, {"args_bytes": 48}, {"major": 1}, {"api_bytes": 100},
], ids=str)  # fmt: skip
def test_another_layout_is_refused(options):
    call = Call(**options)
    assert call.run()
    ((code, message),) = call.messages
    assert code == 3
    assert message == (
        f"batchnorm: compiled for version 0.1 of XLA's interface, and called by {options.get('major', 0)}.0, which "
        "lays out its calls in another way"
    )


def test_a_longer_frame_is_taken():
    """A later minor version appends fields: the only error of this call is that it has no operands."""
    call = Call(frame_bytes=WORD * 30)
    assert call.run()
    assert call.messages == [(3, "batchnorm: takes 5 operands, not 0; was the program exported by another version?")]


def test_another_stage_is_refused():
    call = Call(stage=1)
    assert call.run()
    assert call.messages == [(3, "batchnorm: called in another stage than that of execution")]


# ---- operands that XLA passes on ----------------------------------------------------------------------------------

OPTIONS = {"eps": np.float64(0), "activation": np.int64(0), "slope": np.float64(0), "normalized_padding": False}


def call_forward(x, gamma=None, **options):
    assert jax_kernel.backward_p.name == "batchnorm_backward"  # the module registers the targets
    absent = jnp.zeros(0, x.dtype)
    channels = jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), jnp.float32)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), *[channels] * 4]
    results.append(jax.ShapeDtypeStruct(channels.shape, jnp.int32))
    call = jax.ffi.ffi_call("batchnorm_forward", results)
    return call(x, absent if gamma is None else gamma, absent, absent, absent, **(OPTIONS | options))


AVERAGING = {
    "tracked": np.int64(0), "debias": np.int64(0), "correction": np.int64(0), "corrects_tracked": False,
    "is_clamped": True, "needs_two": False, "is_cumulative": False, "momentum": np.float64(0.25), "eps": np.float64(0),
}  # fmt: skip


def call_advance(mean, count=None, **options):
    one, scalar = jnp.ones_like(mean), jnp.ones((len(mean), 1))
    count = jnp.full(mean.shape, 2, jnp.int32) if count is None else count
    operands = (mean, one, scalar, scalar, scalar, count, 5 * one, 0 * one, 4 * one)
    call = jax.ffi.ffi_call("batchnorm_advance", [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands[:5]])
    return call(*operands, **(AVERAGING | options))


def test_an_update_by_hand():
    mean, spread, steps, weight, skipped = call_advance(jnp.asarray([[1.0, 9.0]]))
    assert (mean.tolist(), spread.tolist()) == ([[2, 8]], [[1.25, 1.25]])
    assert (steps.tolist(), weight.tolist(), skipped.tolist()) == ([[2]], [[1]], [[1]])


@pytest.mark.parametrize(("needs_two", "updated"), [(False, [[2, 8]]), (True, [[1, 8]])])
def test_a_channel_with_one_element_by_hand(needs_two, updated):
    count = jnp.asarray([[1, 2]], jnp.int32)
    mean, _, steps, *_ = call_advance(jnp.asarray([[1.0, 9.0]]), count=count, needs_two=needs_two)
    assert (mean.tolist(), steps.tolist()) == (updated, [[2]])


def test_a_call_by_hand():
    y, mean, *_ = call_forward(jnp.asarray([[[1.0], [3.0]]]))
    assert y.ravel().tolist() == [-1, 1]
    assert mean.tolist() == [[2]]


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: call_forward(x, gamma=jnp.ones((1, 2))), "operands that do not go together"),
    (lambda x: call_forward(x[..., None, None]), "operands that do not go together"),
    (lambda x: call_forward(x.astype(jnp.int32)), "an operand is not of float64, float32, float16 or bfloat16"),
    (lambda x: call_forward(x, activation=np.int64(9)), "operands that do not go together"),
    (lambda x: call_forward(x, eps=np.float32(0.5)), "the attribute eps has another type than it was declared with"),
    (lambda x: call_forward(x, another=np.int64(0)), "takes 4 attributes, not 5; was the program exported by another"),
    (lambda x: jax.ffi.ffi_call("batchnorm_backward", [x] * 4)(x), "takes 10 operands, not 1; was the program"),
    (lambda x: call_advance(x[0], count=jnp.ones((1, 3), jnp.int32)), "operands that do not go together"),
    (lambda x: call_advance(x), "operands that do not go together"),
    (lambda x: call_advance(x[0].astype(jnp.bfloat16)), "operands that do not go together"),
    (lambda x: call_advance(x[0], tracked=np.int64(6)), "operands that do not go together"),
    (lambda x: call_advance(x[0], debias=np.int64(-1)), "operands that do not go together"),
], ids=[
    "shape", "rank", "dtype", "activation", "type of an attribute", "attributes", "operands", "counts",
    "rank of a state", "dtype of a state", "tracked", "debias",
])  # fmt: skip
def test_operands_that_do_not_fit(call, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(f"INVALID_ARGUMENT: batchnorm: {message}")):
        jax.block_until_ready(call(jnp.ones((1, 2, 1))))


def test_array_code_takes_over_where_jaxlib_has_no_header():
    program = (
        "import jax, jax.numpy as jnp, batchnorm as bn\njax.ffi.include_dir = lambda: '/nowhere'\n"
        "print(bn.forward(jnp.asarray([[1.0], [3.0]]), eps=0)[0].ravel().tolist())\n"
        "try:\n    bn.forward(jnp.ones((2, 1)), kernel='native')\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    y, message = done.stdout.splitlines()
    assert y == "[-1.0, 1.0]"
    assert "the version of XLA's interface is unknown: jaxlib has no /nowhere/xla/ffi/api/c_api.h" in message
