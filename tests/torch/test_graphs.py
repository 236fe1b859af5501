"""Layers that are compiled, traced and exported."""

import copy
from dataclasses import replace

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from small_networks import images, small_network
from torch import fx, nn

import batchnorm as bn
import batchnorm.torch as bnt


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_training(momentum):
    """In one graph, with the state advanced; momentum=None needs the number of batches as a tensor."""
    torch._dynamo.reset()
    eager, other = small_network(bnt.BatchNorm2d, momentum=momentum), small_network(bnt.BatchNorm2d, momentum=momentum)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        results = []
        for call, model in ((eager, eager), (compiled, other)):
            model.zero_grad()
            y = call(x)
            y.pow(2).sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert other[1].num_batches_tracked == 3


@pytest.mark.parametrize(
    "options",
    [
        {"virtual_batch_size": 4},
        {"virtual_batch_size": 4, "convention": "lasagne-gist", "activation": "silu"},
        *({"convention": name} for name in bn.CONVENTIONS),
        {"convention": replace(bn.CONVENTIONS["flax"], debias="adam")},
        {"convention": replace(bn.CONVENTIONS["pytorch"], normalize_correction=1)},
    ],
    ids=str,
)
def test_compiled_general_layer(options):
    """Ghost batches and every convention, in one graph: y, gradients and state, and then in evaluation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv1d(3, 5, 1), bnt.BatchNorm(5, **{"axis": 1} | options))
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(10, 3, 7)  # two groups of four, and one of two
        results = []
        for call, model in ((eager, eager), (compiled, other)):
            model.zero_grad()
            y = call(x)
            y.pow(3).sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
        assert len(results[0]) == len(results[1])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    eager.eval(), other.eval()
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"virtual_batch_size": 4},
        {"convention": replace(bn.CONVENTIONS["pytorch"], normalize_correction=1, eps_train="outside")},
    ],
    ids=str,
)
def test_compiled_training_where_the_kernels_decline(options, monkeypatch):
    """As on a GPU: by the generic implementation, whose gradients are those of autograd within an operator."""
    torch._dynamo.reset()
    eager = nn.Sequential(nn.Conv1d(3, 5, 1), bnt.BatchNorm(5, **options))
    other, x = copy.deepcopy(eager), torch.randn(10, 3, 7)
    compiled, results = torch.compile(other, fullgraph=True, backend="aot_eager"), []
    for call, model in ((eager, eager), (compiled, other)):
        y = call(x)
        y.pow(3).sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
        monkeypatch.setattr("batchnorm.kernels.torch.operators.are_concrete", lambda *tensors: False)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_native_compiled_training():
    """PyTorch's own layer cannot be compiled with the cumulative average (pytorch#194504)."""
    torch._dynamo.reset()
    native = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None))
    with pytest.raises(Exception, match="Could not guard on data-dependent expression"):
        torch.compile(native, fullgraph=True, backend="aot_eager")(torch.randn(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_inductor():
    torch._dynamo.reset()
    eager, other = small_network(bnt.BatchNorm2d), small_network(bnt.BatchNorm2d)
    x = images()
    torch.testing.assert_close(torch.compile(other, fullgraph=True)(x), eager(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other[1].running_var, eager[1].running_var)
    eager.eval(), other.eval()
    torch.testing.assert_close(torch.compile(other, fullgraph=True)(x), eager(x), rtol=1e-4, atol=1e-4)


def test_compiled_with_a_mask_and_an_activation():
    torch._dynamo.reset()
    layer, other = (bnt.BatchNorm(4, activation="relu") for _ in range(2))
    x, lengths = torch.randn(3, 4, 6), torch.tensor([6, 2, 4])
    y = torch.compile(other, fullgraph=True, backend="aot_eager")(x, lengths=lengths)
    torch.testing.assert_close(y, layer(x, lengths=lengths))
    torch.testing.assert_close(other.running_var, layer.running_var)


@pytest.mark.parametrize("convention", ["pytorch", "lasagne-gist"])
def test_compiled_evaluation_ignores_nan_in_padding(convention):
    """The gradients of a frozen layer's parameters as well: 0 times NaN is NaN."""
    torch._dynamo.reset()
    layer = bnt.BatchNorm(4, axis=1, convention=convention, activation="sigmoid").eval()  # not 0 unless masked
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
            tensor.uniform_(0.5, 2)
    other = copy.deepcopy(layer)
    x, lengths = torch.randn(3, 4, 6), torch.tensor([6, 2, 4])
    x[1, :, 5] = torch.nan
    y, expected = (
        torch.compile(other, fullgraph=True, backend="aot_eager")(x, lengths=lengths),
        layer(x, lengths=lengths),
    )
    torch.testing.assert_close(y, expected)
    for result in (y, expected):
        result.pow(2).sum().backward()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(other, name).grad, getattr(layer, name).grad)


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"convention": "lasagne-gist"}], ids=str)
def test_what_breaks_a_compiled_graph(options):
    torch._dynamo.reset()
    layer, other = (bnt.BatchNorm(4, **options) for _ in range(2))
    x = torch.randn(6, 4, 3)
    torch.testing.assert_close(torch.compile(other, backend="aot_eager")(x), layer(x))
    torch.testing.assert_close(other.running_var, layer.running_var)


@pytest.mark.parametrize("norm", [bnt.BatchNorm2d, lambda n: bnt.BatchNorm(n, activation="relu")])
def test_symbolic_trace(norm):
    """A node of its own, so that `eval` works on the traced network as well."""
    model = small_network(norm)
    traced = fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes if node.target == "1"] == ["call_module"]
    x = images()
    torch.testing.assert_close(traced(x), small_network(norm)(x))
    assert model[1].num_batches_tracked == 1
    model.eval(), traced.eval()
    torch.testing.assert_close(traced(x), model(x))


def test_export_of_the_evaluated_network():
    """As PyTorch's own operator, which every back end knows."""
    model = small_network(bnt.BatchNorm2d)
    model(images())
    exported = torch.export.export(model.eval(), (images(),))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert any("batch_norm" in target for target in targets)
    assert not any("batchnorm." in target for target in targets)
    torch.testing.assert_close(exported.module()(images()), model(images()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    model = small_network(bnt.BatchNorm2d).eval()
    traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images()), model(images()))


def test_on_another_device():
    """PyTorch's own operators compute: nothing is copied to the CPU."""
    layer = bnt.BatchNorm2d(4, device="meta")
    x = torch.empty(2, 4, 3, 3, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.is_meta
    assert x.grad.is_meta


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"virtual_batch_size": 2}, {"convention": "keras", "activation": "relu"}],
    ids=str,
)
@pytest.mark.parametrize("argument", [None, "mask", "lengths"])
def test_no_number_is_sent_to_another_device(options, argument, monkeypatch):
    """Each is a wait for the device, and an error where a CUDA graph is captured."""

    def checked(value, *rest, **options):
        assert isinstance(value, torch.Tensor), "a number of Python's becomes a tensor"
        return value

    layer, x = bnt.BatchNorm(4, **{"axis": 1} | options, device="meta"), torch.empty(6, 4, 3, device="meta")
    kinds = {"mask": ((6, 1, 3), torch.bool), "lengths": ((6,), torch.int64)}
    arguments = (
        {} if argument is None else {argument: torch.empty(kinds[argument][0], dtype=kinds[argument][1], device="meta")}
    )
    for name in ("asarray", "as_tensor", "tensor"):
        monkeypatch.setattr(torch, name, checked)
    y = layer(x.requires_grad_(), **arguments)
    y.sum().backward()
    assert x.grad.shape == y.shape == x.shape


@pytest.mark.cpu("the reference of ONNX is")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("norm", [bnt.BatchNorm2d, lambda n: bnt.BatchNorm(n, activation="relu")])
def test_onnx(norm):
    """As ONNX's BatchNormalization, by the numbers of ONNX's own reference."""
    model = small_network(norm)
    model(images() + 1)
    program = torch.onnx.export(model.eval(), (images(),), dynamo=True, verbose=False, optimize=False)
    nodes = [node.op_type for node in program.model_proto.graph.node]
    assert "BatchNormalization" in nodes
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "ai.onnx"}
    onnx.checker.check_model(program.model_proto)
    session = ReferenceEvaluator(program.model_proto)
    (y,) = session.run(None, {program.model_proto.graph.input[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(images()).detach(), rtol=1e-4, atol=1e-5)
