"""Cases and made-up results for the tests of the benchmarks."""

from benchmarks.cases import Case
from benchmarks.machine import Machine, instruction_set_in_use
from benchmarks.results import Result

from batchnorm import _native

BEST = _native.instruction_sets()[0]


def case(operation="forward", layout="NCHW", shape=(32, 64, 56, 56), dtype="float32", family="grid"):
    return Case(family, operation, dtype, layout, shape)


def result(chosen, contestant, ratio, threads=2, instruction_set="avx512bf16", others=0.0, is_disturbed=False):
    return Result(
        chosen, threads, instruction_set, contestant, 90.0, 100.0, 110.0, 7, ratio, others, is_disturbed=is_disturbed
    )


def machine(instruction_sets="avx512bf16 avx512 avx2 baseline"):
    return Machine(
        commit="c0ffee-dirty",
        date="2026-01-02 03:04",
        machine="a machine, 2 cores",
        os="Linux",
        compiler="g++ 12",
        python="3.11",
        batchnorm="0.1",
        torch="2.13",
        jax="0.10",
        numpy="2.4",
        openvino="2026.4",
        instruction_sets=instruction_sets,
    )


def capabilities(plan):
    """The instruction sets that PyTorch and the kernels use in the process of a plan."""
    import torch

    yield torch.backends.cpu.get_cpu_capability(), instruction_set_in_use()
