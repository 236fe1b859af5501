"""Which tests run on which instruction sets."""

import pytest

from batchnorm import _native

#: From the best that the machine has to `baseline`.
ALL = _native.instruction_sets()
#: The best and `baseline`. The others differ from these below `row_layout.hpp` alone, in `simd.hpp`, `loads.hpp` and
#: `activations.hpp`, so that tests of what is above it need not run on them.
ENDS = list(dict.fromkeys((ALL[0], ALL[-1])))

every_instruction_set = pytest.mark.parametrize("instruction_set", ALL, indirect=True)


def on_a_part(cases, step):
    """The ends with every case, the sets between them with every `step`-th: for `instruction_set` and `case`."""
    found = [(name, case) for name in ALL for case in (cases if name in ENDS else cases[::step])]
    return pytest.mark.parametrize(
        ("instruction_set", "case"), found, indirect=["instruction_set"], ids=[f"{name}-{case}" for name, case in found]
    )
