"""Graphs that leave PyTorch: exported, traced, scripted, quantized, translated to ONNX."""

import copy
import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from small_networks import images, small_network
from torch import nn

import batchnorm.torch as bnt

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)


def pair(**options):
    """The same network, ours and PyTorch's."""
    ours, native = small_network(**options), small_network(**options)
    bnt.replace(ours)
    return ours, native


def operators(exported):
    return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_export_is_that_of_torch(options, training, strict):
    """Operator for operator, so that tools that rewrite the graph recognize it."""
    programs = [torch.export.export(n.train(training), (images(),), strict=strict) for n in pair(**options)]
    ours, native = map(operators, programs)
    assert ours == native
    assert any("batch_norm" in target for target in ours)
    modules = [program.module() for program in programs]
    torch.testing.assert_close(*({"y": module(images()), **dict(module.named_buffers())} for module in modules))


def test_an_exported_training_graph_can_be_switched_to_evaluation():
    """As quantization-aware training does (`move_exported_model_to_eval`): by the arguments of `aten.batch_norm`."""
    results = []
    for module in pair():
        module(images(2))
        exported = torch.export.export(module.train(), (images(),)).module()
        for node in exported.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                node.args = (*node.args[:5], False, *node.args[6:])
            elif node.target is torch.ops.aten.add_.Tensor:  # the number of batches
                node.args = (node.args[0], 0)
        exported.recompile()
        before = [buffer.clone() for buffer in exported.buffers()]
        results.append(exported(images(3)))
        for buffer, value in zip(exported.buffers(), before, strict=True):
            assert torch.equal(buffer, value)
        torch.testing.assert_close(results[-1], module.eval()(images(3)))
    torch.testing.assert_close(*results)


def test_a_frozen_layer_exports_as_evaluation():
    module = small_network(bnt.BatchNorm2d)
    module(images())
    bnt.freeze(module)
    exported = torch.export.export(module.train(), (images(),))
    torch.testing.assert_close(exported.module()(images(2)), module(images(2)))


class Masked(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = bnt.BatchNorm(4, **options)

    def forward(self, x, lengths):
        return self.norm(x, lengths=lengths)


@pytest.mark.parametrize(
    ("module", "arguments", "reason"),
    [
        (Masked(), (torch.randn(3, 4, 5), torch.tensor([5, 2, 3])), "a mask"),
        (bnt.BatchNorm(4, convention="lasagne-gist"), (torch.randn(3, 4),), "the convention 'lasagne-gist'"),
        (bnt.BatchNorm(4, convention="flax"), (torch.randn(3, 4),), "the convention 'flax'"),
        (bnt.BatchNorm1d(4, momentum=None), (torch.randn(3, 4),), "momentum=None"),
        (bnt.BatchNorm(4, virtual_batch_size=2), (torch.randn(6, 4),), "ghost batches"),
    ],
    ids=["mask", "lasagne", "flax", "cumulative", "ghosts"],
)
def test_training_without_an_operator_of_torch_is_refused(module, arguments, reason):
    """PyTorch's batch norm operator cannot express it in training, but can in evaluation."""
    axis = 1 if isinstance(module, (Masked, bnt.BatchNorm1d)) else module.axis
    arguments = (arguments[0].movedim(1, axis), *arguments[1:])
    with pytest.raises(Exception, match=reason):
        torch.export.export(module.train(), arguments)
    with pytest.raises(NotImplementedError, match=reason):
        torch.jit.trace(module, arguments)
    exported = torch.export.export(module.eval(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), module(*arguments))


@pytest.mark.parametrize(
    ("activation", "operator"),
    [
        ("relu", "relu"), ("relu6", "hardtanh"), ("hardswish", "hardswish"), ("leaky_relu(0.2)", "leaky_relu"),
        ("gelu", "gelu"), ("silu", "silu"), ("tanh", "tanh"), ("sigmoid", "sigmoid"),
    ],
)  # fmt: skip
def test_activations_export_as_operators_of_torch(activation, operator):
    module = bnt.BatchNorm(3, activation=activation)
    for training in (False, True):
        exported = torch.export.export(module.train(training), (images(),))
        assert operators(exported)[-1] == f"aten.{operator}.default"
        torch.testing.assert_close(exported.module()(images()), copy.deepcopy(module)(images()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_jit_trace(training, momentum):
    results = []
    for module in pair(momentum=momentum):
        if momentum is None and training and isinstance(module[1], bnt.BatchNorm2d):
            continue
        module(images(2))
        traced = torch.jit.trace(module.train(training), images(), check_trace=False)
        results.append([traced(images(3)), *traced.state_dict().values()])
    if len(results) == 2:
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
@pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
def test_script(kind, options):
    shape = {"1d": (6, 3, 4), "2d": (4, 3, 5, 5), "3d": (2, 3, 4, 4, 4)}[kind]
    ours, native = (getattr(library, f"BatchNorm{kind}")(3, **options) for library in (bnt, nn))
    scripted = [torch.jit.script(nn.Sequential(layer, nn.ReLU())) for layer in (ours, native)]
    for training in (True, True, False):
        x = torch.randn(shape) * 3 + 1
        results = [module.train(training)(x) for module in scripted]
        torch.testing.assert_close(*results)
    torch.testing.assert_close(*([*module.state_dict().values()] for module in scripted))
    buffer = io.BytesIO()
    torch.jit.save(scripted[0], buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), scripted[1](x))
    assert type(ours) is getattr(bnt, f"BatchNorm{kind}")
    torch.testing.assert_close(ours.eval()(x), native.eval()(x))  # the module itself is as it was


@pytest.mark.cpu("results wait for what follows on")
def test_scripts_of_fused_and_frozen_layers():
    ours, native = pair()
    bnt.replace(ours, fuse=True, example=images())
    torch.testing.assert_close(torch.jit.script(ours)(images()), torch.jit.script(native)(images()))
    assert ours[1].fused == "relu"
    bnt.freeze(ours)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted.train()(images(3)), native.eval()(images(3)))
    assert scripted.state_dict()["1.num_batches_tracked"] == 1


@pytest.mark.parametrize("layer", [bnt.BatchNorm(3, activation="relu"), bnt.SyncBatchNorm(3)], ids=["general", "sync"])
def test_unscriptable_layers_raise(layer):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script does not compile"):
        torch.jit.script(nn.Sequential(layer))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_onnx_is_that_of_torch(options, training, dynamo):
    """Of both exporters, in evaluation and in training, with and without running statistics."""
    results = []
    for module in pair(**options):
        module(images() + 1)
        module.train(training)
        if dynamo:
            program = torch.onnx.export(module, (images(),), dynamo=True, verbose=False, optimize=False).model_proto
        else:
            mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
            buffer = io.BytesIO()
            torch.onnx.export(module, (images(),), buffer, dynamo=False, training=mode, do_constant_folding=False)
            program = onnx.load_from_string(buffer.getvalue())
        onnx.checker.check_model(program)
        nodes = [node.op_type for node in program.graph.node]
        assert {node.domain for node in program.graph.node} <= {"", "ai.onnx"}
        feed = {program.graph.input[0].name: images(5).cpu().numpy()}
        results.append((nodes, None if training else ReferenceEvaluator(program).run(None, feed)[0]))
    (ours, y), (native, expected) = results
    assert ours == native
    if expected is not None:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "2"]], ids=len)
def test_eager_quantization_fuses(names, is_qat):
    from torch.ao.quantization import fuse_modules, fuse_modules_qat

    results = []
    for module in pair():
        module(images())
        fused = (fuse_modules_qat if is_qat else fuse_modules)(module.train(is_qat), [names])
        assert not any("batchnorm.torch" in type(m).__module__ for m in fused.modules())
        results.append([fused(images(2)), [type(m) for m in fused.modules()]])
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_fx_quantization_of_a_restored_model():
    """Quantization compares exact classes, which `restored` provides."""
    from torch.ao.quantization.quantize_fx import fuse_fx

    ours, native = pair()
    for module in (ours, native):
        module(images()), module.eval()
    with bnt.restored(ours):
        fused = fuse_fx(ours)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    torch.testing.assert_close(fused(images(2)), ours(images(2)))
    assert type(ours[1]) is bnt.BatchNorm2d


def test_native_synchronization_of_unknown_options_is_refused():
    frozen, single, plain = (small_network(bnt.BatchNorm2d) for _ in range(3))
    bnt.freeze(frozen)
    single[1].single = "running"
    bnt.replace(single)
    for module, what in ((frozen, "frozen"), (single, "single='running'")):
        with pytest.raises(RuntimeError, match=f"is {what}, which torch.nn.SyncBatchNorm does not know"):
            nn.SyncBatchNorm.convert_sync_batchnorm(module)
        assert not hasattr(module[1], "qconfig")  # other callers get an AttributeError
        converted = bnt.SyncBatchNorm.convert_sync_batchnorm(module)
        assert converted is module
        assert (module[1].is_frozen, module[1].single) == (what == "frozen", "error" if what == "frozen" else "running")
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(plain)[1]) is nn.SyncBatchNorm


def test_our_synchronization_names_what_it_cannot_convert():
    module = nn.Sequential(bnt.BatchNorm2d(3), nn.Sequential(bnt.BatchNorm(3, activation="relu")))
    with pytest.raises(ValueError, match=r"1\.0: a batchnorm\.torch\.BatchNorm .* has no synchronized form"):
        bnt.SyncBatchNorm.convert_sync_batchnorm(module)
    assert type(module[0]) is bnt.BatchNorm2d
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnt.SyncBatchNorm.convert_sync_batchnorm(module[0])
    assert type(module[0]) is bnt.SyncBatchNorm
