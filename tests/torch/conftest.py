"""The device of the tests of PyTorch's layers: the CPU, or another one by `pytest tests/torch --device cuda`."""

from contextlib import nullcontext

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests/torch creates its tensors, such as cuda")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu(reason): not run on another device, and why")
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))  # before modules create tensors at import


def pytest_ignore_collect(collection_path, config):
    is_of_cuda = collection_path.name == "test_cuda.py"
    return True if is_of_cuda and not config.getoption("--device").startswith("cuda") else None


@pytest.fixture
def device(request):
    """Where tensors are created unless a test says otherwise."""
    return request.config.getoption("--device")


@pytest.fixture
def warns_of_a_bad_batch(device):
    """The context of a call on a batch that is not finite, which warns only on the CPU."""
    text = "the statistics of a batch are not finite"
    return lambda: pytest.warns(RuntimeWarning, match=text) if device == "cpu" else nullcontext()


def pytest_runtest_setup(item):
    mark = item.get_closest_marker("cpu")
    if mark is not None and item.config.getoption("--device") != "cpu":
        pytest.skip(f"of the CPU alone: {mark.args[0]}")
