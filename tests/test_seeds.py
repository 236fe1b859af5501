"""Random numbers of tests: each test has its own, equal in every process and selection."""

import re
from pathlib import Path

import numpy as np
from seeds import generator_of


def test_numbers_are_of_the_test_s_name(rng, request):
    np.testing.assert_array_equal(rng.random(3), generator_of(request.node.nodeid).random(3))
    assert generator_of("tests/test_seeds.py::test").integers(2**31) == 1746539255
    assert generator_of("a").random() != generator_of("b").random()


def test_addresses_are_no_part_of_the_name():
    one, other = (generator_of(f"test[<function f at 0x{address}>-3]") for address in ("7f01", "7f02ab"))
    assert one.random() == other.random()


def test_no_module_shares_a_generator_between_its_tests():
    shared = re.compile(r"^\w+ = (np\.random\.(default_rng|RandomState)|random\.Random)\([^)]*\)$", re.MULTILINE)
    assert shared.search("RNG = np.random.default_rng(7)")
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    assert len(files) > 100
    assert [str(file) for file in files if shared.search(file.read_text())] == []
