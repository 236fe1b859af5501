"""Fixtures that set the instruction set and the number of threads of this process."""

import pytest
import torch
from instruction_sets import ENDS

import batchnorm as bn
from batchnorm import _native

bn.set_num_threads(_native.num_threads())  # loads the kernels, which choose an instruction set when they are loaded


@pytest.fixture(params=ENDS)
def instruction_set(request):
    """Run with the best set and with `baseline`, or with a mark's sets; restore the previous set afterwards."""
    before = _native.instruction_set()
    _native.set_instruction_set(request.param)
    yield request.param
    assert _native.instruction_set() == request.param
    _native.set_instruction_set(before)


@pytest.fixture
def set_threads():
    """A function that sets the threads of NumPy's and PyTorch's calls, which are restored afterwards."""
    before, before_torch = _native.num_threads(), torch.get_num_threads()

    def set_both(threads):
        bn.set_num_threads(threads)
        torch.set_num_threads(threads)

    yield set_both
    bn.set_num_threads(before)
    torch.set_num_threads(before_torch)
