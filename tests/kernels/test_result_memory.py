"""Large results come from a pool: a freed block is reused for the next result of its size."""

import copy
import io
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm import _native

SMALLEST, MOST_WAITING = 2**18, 512 * 2**20  # of cpp/memory.hpp


@pytest.fixture(autouse=True)
def _nothing_waits():
    _native.release_cached()
    assert _native.cached_bytes() == 0
    yield
    _native.release_cached()


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


X = numbers(16, 32, 32, 32)  # 2 MiB


def test_the_next_result_of_that_size_gets_the_block():
    y, cache = bn.forward(X)
    address, expected = y.data_ptr(), y.clone()
    del y
    assert _native.cached_bytes() == X.nbytes
    again = bn.forward(X)[0]
    assert again.data_ptr() == address
    assert _native.cached_bytes() == 0
    assert torch.equal(again, expected)
    dx = bn.backward(X, cache).dx
    assert dx.data_ptr() != address
    del again, dx
    assert _native.cached_bytes() == 2 * X.nbytes


def test_the_block_stays_while_anything_refers_to_it():
    y = bn.forward(X)[0]
    view, array, expected = y[3], y.numpy(), y.clone()
    del y
    bn.forward(-X)
    assert torch.equal(view, expected[3])
    del view
    bn.forward(-X)
    assert torch.equal(torch.from_numpy(array), expected)
    del array
    assert _native.cached_bytes() == 2 * X.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: x[:, :, None],
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],  # not dense: PyTorch allocates
        lambda x: x[:1, :1],  # small: PyTorch allocates
    ],
)
def test_like_what_pytorch_would_allocate(layout, dtype):
    x = layout(numbers(16, 32, 32, 64, dtype=dtype))
    y = bn.forward(x)[0]
    like = torch.empty_like(x)
    assert (y.shape, y.stride(), y.dtype, y.device) == (like.shape, like.stride(), dtype, like.device)
    assert y.storage_offset() == 0
    assert y.is_leaf
    assert not y.requires_grad
    assert y._base is None
    assert y.data_ptr() % 64 == 0
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-8, atol=2.0**-8)


def test_results_are_tensors_like_any_other():
    y = bn.forward(X)[0]
    expected = y.clone()
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), expected)
    assert torch.equal(copy.deepcopy(y), expected)
    leaf = y.requires_grad_()
    (leaf * 2).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(X, 2))
    y = y.detach()
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, expected)
    y.add_(1)
    assert torch.equal(y, expected + 1)
    with torch.inference_mode():
        inferred = bn.forward(X)[0]
    assert inferred.is_inference()


def test_with_autograd():
    x = X.clone().requires_grad_()
    y = bn.batch_norm(x)[0]
    y.backward(X)
    addresses = {y.data_ptr(), x.grad.data_ptr()}
    exact = X.clone().requires_grad_()
    torch.nn.functional.batch_norm(exact, None, None, training=True).backward(X)
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-5, atol=1e-5)
    del y
    x.grad = None
    _native.pooled_like(X)
    assert bn.forward(X)[0].data_ptr() in addresses


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_numpy(dtype):
    x = X.numpy().astype(dtype)
    y, cache = bn.forward(x)
    address = y.ctypes.data
    assert (y.shape, y.dtype, y.flags.c_contiguous, y.flags.writeable) == (x.shape, x.dtype, True, True)
    view = y[2:]
    del y
    assert _native.cached_bytes() == 0
    dx = bn.backward(x, cache).dx
    assert not np.shares_memory(view, dx)
    del view
    assert _native.cached_bytes() == x.nbytes
    again = bn.forward(x)[0]
    assert again.ctypes.data == address
    np.testing.assert_array_equal(again, np.asarray(bn.forward(x, kernel="native")[0]))
    small = bn.forward(x[:1, :4])[0]
    assert small.flags.owndata
    fortran = bn.forward(np.asfortranarray(x))[0]
    assert fortran.strides == np.asfortranarray(x).strides


def test_only_so_much_waits():
    prototype = torch.empty(MOST_WAITING // 8 // 4)
    results = [_native.pooled_like(prototype) for _ in range(9)]
    while results:
        results.pop()
        assert _native.cached_bytes() == min(9 - len(results), 8) * prototype.nbytes
    _native.release_cached()
    assert _native.cached_bytes() == 0
    huge = _native.pooled_like(torch.empty(MOST_WAITING // 4 + 1))
    assert huge is not None
    del huge
    assert _native.cached_bytes() == 0


def test_small_results_go_back_at_once():
    for length in (0, 1, SMALLEST // 4 - 1):
        result = _native.pooled_like(torch.empty(length))
        assert result.shape == (length,)
        del result
        assert _native.cached_bytes() == 0
    _native.pooled_like(torch.empty(SMALLEST // 4))
    assert _native.cached_bytes() == SMALLEST


def test_blocks_of_another_size_are_not_taken():
    _native.pooled_like(torch.empty(4 * SMALLEST // 4))
    waiting = _native.cached_bytes()
    small = _native.pooled_like(torch.empty(SMALLEST // 4))
    assert _native.cached_bytes() == waiting
    assert small is not None


def test_many_threads():
    samples = [numbers(8 + i % 3, 32, 32, 64) for i in range(6)]
    expected = [bn.forward(x)[0].clone() for x in samples]

    def compute(i):
        y = bn.forward(samples[i % 6])[0]
        return torch.equal(y, expected[i % 6])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(compute, range(120)))


def run_program(program):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_forked_child():
    """It frees its parent's blocks and reuses pooled ones, without changing the parent's memory."""
    program = """
        import os, threading, torch
        import batchnorm as bn

        torch.set_num_threads(1)
        x = torch.randn(16, 32, 32, 32)
        y, expected = bn.forward(x)[0], bn.forward(x)[0].clone()
        stop = threading.Event()

        def churn():
            while not stop.is_set():
                bn.forward(x)

        threads = [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        statuses = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                same = torch.equal(y, expected)
                del y
                z = bn.forward(-x)[0]
                os._exit(0 if same and torch.allclose(z, -expected, atol=1e-5) else 7)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        stop.set()
        for thread in threads:
            thread.join()
        print(statuses == [0] * 10, torch.equal(y, expected))
    """
    result = run_program(program)
    assert (result.stdout.strip(), result.stderr) == ("True True", "")


def test_out_of_memory():
    """The pool is released to the system first; then a MemoryError is raised, and later calls work."""
    program = """
        import resource, torch
        import batchnorm as bn
        from batchnorm import _native

        torch.set_num_threads(1)
        x = torch.randn(64, 64, 64, 64)
        waiting = [_native.pooled_like(x[:16]) for _ in range(8)]
        expected = bn.forward(x[:1])[0]
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + x.nbytes // 2, resource.RLIM_INFINITY))
        try:
            bn.forward(x)
        except MemoryError:
            print("MemoryError")
        del waiting
        print(_native.cached_bytes() > x.nbytes)
        y = bn.forward(x)[0]
        print(y.shape == x.shape, torch.equal(bn.forward(x[:1])[0], expected))
    """
    result = run_program(program)
    assert (result.stdout.split(), result.stderr) == (["MemoryError", "True", "True", "True"], "")
