"""Calls from many Python threads at once, and after a fork."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from oracle import check_gradients, check_moments, check_y, expected

import batchnorm as bn


def test_many_callers_at_once(set_threads):
    """Eight callers, each with arrays and shapes of its own, and a kernel that uses threads itself."""
    set_threads(2)
    rng = np.random.default_rng(8)
    shapes = [(40, 3 + i, 300 + i) for i in range(4)] + [(9000 + i, 5 + i) for i in range(4)]
    samples, exact = [], []
    for shape in shapes:
        x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
        dy[np.abs(expected(x).z) < 1e-4] = 0  # float32 may be on the other side of relu's kink
        samples.append((x, dy))
        exact.append(expected(x, dy, activation="relu"))

    def compute(i):
        x, dy = samples[i % 8]
        y, cache = bn.forward(x, activation="relu")
        return y, bn.backward(dy, cache), bn.moments(x)

    with ThreadPoolExecutor(8) as pool:
        computed = list(pool.map(compute, range(48)))
    for i, (y, gradients, moments) in enumerate(computed):
        check_y(y, exact[i % 8], "float32")
        check_moments(moments, exact[i % 8], "float32")
        check_gradients(gradients, exact[i % 8], "float32")
        np.testing.assert_array_equal(gradients.dx, computed[i % 8][1].dx)


def run_program(program, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def test_a_forked_child_computes_alone():
    """OpenMP's threads do not survive a fork; a child that waited for them would hang."""
    program = """
        import os, sys
        import numpy as np
        import batchnorm as bn
        from batchnorm import _native

        x = np.random.default_rng(0).normal(size=(300, 1000)).astype(np.float32)
        bn.set_num_threads(4)

        def results():
            y, cache = bn.forward(x, activation="silu")
            return [y, *bn.backward(x, cache)[:1], *bn.moments(x)]

        before = results()
        for generation in range(2):  # a child, and its own child
            child = os.fork()
            if child == 0:
                bn.set_num_threads(4)
                same = all(np.array_equal(a, b) for a, b in zip(results(), before, strict=True))
                if generation == 1 or not same or _native.num_threads() != 1:
                    os._exit(0 if same and _native.num_threads() == 1 else 7)
                continue
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if generation == 1:
                os._exit(status)
            print(status, _native.num_threads(), np.array_equal(results()[0], before[0]))
            break
    """
    result = run_program(program)
    assert (result.stdout.strip(), result.stderr) == ("0 4 True", "")


def test_a_forked_child_with_tensors():
    """PyTorch's own operations hang in the child once they use threads: the results are compared as NumPy arrays."""
    program = """
        import os, torch
        import batchnorm as bn

        torch.set_num_threads(4)
        x = torch.randn(300, 1000)
        before = bn.forward(x)[0]
        child = os.fork()
        if child == 0:
            os._exit(0 if (bn.forward(x)[0].numpy() == before.numpy()).all() else 7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    result = run_program(program)
    assert result.stdout.strip() == "0", result.stderr


def test_out_of_memory_is_a_memory_error():
    """4 million channels need 300 MB of workspace: the call fails under a memory limit and succeeds without."""
    program = """
        import resource
        import numpy as np
        import batchnorm as bn
        from batchnorm import _native
        from batchnorm.kernels.native import KERNEL, MEASURE
        from batchnorm.spec import spec_of

        bn.set_num_threads(1)
        channels = 4_000_000
        x = np.ones((1, channels), np.float32)
        spec = spec_of("flax", 1, 2).native

        def call():
            return _native.normalize(KERNEL.array_library, MEASURE, spec, (x, None, None, None, None), None, None, 1)

        pages = int(open("/proc/self/statm").read().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20), before[1]))
        try:
            call()
        except MemoryError as error:
            print(type(error).__name__)
        resource.setrlimit(resource.RLIMIT_AS, before)
        mean = call()[3][0]
        print(mean.shape == (channels,), mean[-1])
    """
    result = run_program(program)
    assert result.stdout.split() == ["MemoryError", "True", "1.0"], result.stderr
