"""Captured graphs, streams, and calls that do not synchronize with the GPU; collected only with --device cuda."""

import copy

import pytest
import torch
from torch import nn

import batchnorm.torch as bnt

LAYERS = {
    "1d": lambda: bnt.BatchNorm1d(4), "cumulative": lambda: bnt.BatchNorm1d(4, momentum=None),
    "groups": lambda: bnt.BatchNorm(4, virtual_batch_size=2, activation="relu"),
    "convention": lambda: bnt.BatchNorm(4, axis=1, convention="keras"),
}  # fmt: skip
ARGUMENTS = {
    "plain": dict, "mask": lambda: {"mask": torch.rand(6, 1, 10) < 0.7},
    "lengths": lambda: {"lengths": torch.tensor([10, 3, 4, 5, 6, 7])},
}  # fmt: skip


@pytest.fixture
def waiting_raises():
    """A function after whose call everything that synchronizes the host with the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_waits_for_nothing(name, arguments, waiting_raises):
    layer, x, options = LAYERS[name](), torch.randn(6, 4, 10, requires_grad=True), ARGUMENTS[arguments]()
    dy = torch.randn_like(x)
    layer(x, **options).backward(dy)
    waiting_raises()
    layer(x, **options).backward(dy)
    torch.cuda.set_sync_debug_mode("default")
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_captured_forward_pass(name, arguments):
    """A replay on other numbers equals the eager call, and skips a batch that is not finite."""
    layer, x, options = LAYERS[name](), torch.randn(6, 4, 10), ARGUMENTS[arguments]()
    eager, stream, graph = copy.deepcopy(layer), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x, **options)
    torch.cuda.current_stream().wait_stream(stream)
    layer.load_state_dict(eager.state_dict())
    with torch.cuda.graph(graph):
        y = layer(x, **options)
    for _ in range(2):
        x.copy_(torch.randn(6, 4, 10))
        graph.replay()
        torch.testing.assert_close(y, eager(x, **options))
        torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    x[0] = torch.nan
    graph.replay()
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert layer.skipped == 1


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_graphed_callables():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), bnt.BatchNorm2d(4), nn.ReLU()).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    eager = copy.deepcopy(network)
    graphed = torch.cuda.make_graphed_callables(network, (x.clone(),))
    network[1].reset_running_stats()
    for step in range(3):
        for call, model in ((graphed, network), (eager, eager)):
            model.zero_grad()
            call(x + step).pow(2).sum().backward()
        torch.testing.assert_close([p.grad for p in network.parameters()], [p.grad for p in eager.parameters()])
        torch.testing.assert_close(network.state_dict(), eager.state_dict())


def test_other_streams():
    """Calls on several streams that wait for each other, queued behind slow work."""
    layer, other = bnt.BatchNorm2d(16), bnt.BatchNorm2d(16)
    inputs, before, outputs = [torch.randn(16, 16, 32, 32) for _ in range(8)], torch.cuda.current_stream(), []
    for x in inputs:
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            outputs.append(layer(x * 1))
        before = stream
    torch.cuda.synchronize()
    assert all(torch.equal(y, other(x)) for x, y in zip(inputs, outputs, strict=True))
    assert torch.equal(layer.running_var, other.running_var)
