"""Cases for the tests of the benchmarks."""

from benchmarks.cases import Case


def case(operation="forward", layout="NCHW", shape=(32, 64, 56, 56), dtype="float32", family="grid"):
    return Case(family, operation, dtype, layout, shape)
