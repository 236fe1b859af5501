"""Compatibility with PyTorch's layers: copies, checkpoints, odd arguments, other kinds of tensors; and messages."""

import copy
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import batchnorm as bn
import batchnorm.torch as bnt


class Subclass(bnt.BatchNorm):
    """A subclass that fixes the number of features."""

    def __init__(self):
        super().__init__(5, activation="relu")


class LazySubclass(bnt.BatchNorm):
    pass


LAYERS = {
    "1d": lambda: bnt.BatchNorm1d(5), "single": lambda: bnt.BatchNorm1d(5, single="running"),
    "general": lambda: bnt.BatchNorm(5, activation="relu"), "lazy": bnt.BatchNorm, "lazy 1d": bnt.LazyBatchNorm1d,
    "sync": lambda: bnt.SyncBatchNorm(5), "subclass": Subclass, "lazy subclass": LazySubclass,
}  # fmt: skip

SAFE = [bnt.BatchNorm, bnt.BatchNorm1d, bnt.LazyBatchNorm1d, bnt.SyncBatchNorm, Subclass, LazySubclass]


def through_a_file(layer):
    """Save the whole layer to a file, and load it."""
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_a_file],
                         ids=["copy", "deepcopy", "pickle", "save"])  # fmt: skip
@pytest.mark.parametrize("name", LAYERS)
def test_copies_are_of_the_same_class(name, copied):
    layer = LAYERS[name]()
    x = torch.randn(6, 5)
    if layer.num_features == 0 and copied is copy.deepcopy:
        layer(x)  # PyTorch's own lazy layers cannot be copied before
    for _ in range(2):  # the second time, a lazy layer has seen its input
        twin = copied(layer)
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        if copied is not copy.copy:
            torch.testing.assert_close(twin(x), layer(x))
        layer(x)
    assert layer.num_features == 5


@pytest.mark.parametrize("name", ["1d", "general", "subclass"])
def test_files_that_execute_nothing(name):
    layer = LAYERS[name]()
    layer(torch.randn(6, 5))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([type(layer), *SAFE]):
        loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is type(layer)
    torch.testing.assert_close(loaded.eval()(torch.ones(6, 5)), layer.eval()(torch.ones(6, 5)))


def test_a_lazy_layer_stays_what_it_is():
    layer = LazySubclass(axis=-1)
    assert repr(layer) == "LazySubclass(lazy, axis=-1)"
    layer(torch.randn(2, 3, 7))
    assert type(layer) is LazySubclass
    assert layer.num_features == 7
    assert repr(layer) == "LazySubclass(7, axis=-1)"
    pickle.loads(pickle.dumps(bnt.BatchNorm()))


@pytest.mark.parametrize("name", ["1d", "general"])
def test_buffers_are_those_of_torch(name):
    """Tools that walk two models in parallel pair them up; skipped batches are counted elsewhere."""
    layer, native = LAYERS[name](), nn.BatchNorm1d(5)
    assert [n for n, _ in layer.named_buffers()] == [n for n, _ in native.named_buffers()]
    before = copy.deepcopy(nn.Sequential(native))
    model = nn.Sequential(native)
    averaged = AveragedModel(before, use_buffers=True)
    bnt.replace(model)
    model(torch.randn(8, 5))
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module[0].running_mean, model[0].running_mean)
    update_bn([torch.randn(8, 5)], model)


def test_a_model_built_on_meta(device, warns_of_a_bad_batch):
    with torch.device("meta"):
        model = nn.Sequential(bnt.BatchNorm1d(3))
    loaded, emptied = copy.deepcopy(model), copy.deepcopy(model).to_empty(device=device)
    source = nn.Sequential(nn.BatchNorm1d(3))
    loaded.load_state_dict(source.state_dict(), assign=True)
    loaded.to(device)
    emptied.load_state_dict(source.state_dict())
    for network in (loaded, emptied, emptied.half()):
        assert int(network[0].skipped) == 0
        with warns_of_a_bad_batch():
            network(torch.full((2, 3), torch.inf, dtype=network[0].weight.dtype))
        assert int(network[0].skipped) == 1
        network[0].reset_running_stats()
    assert model[0].skipped.is_meta


def test_skipped_batches_are_counted_in_a_compiled_graph():
    torch._dynamo.reset()
    model = nn.Sequential(bnt.BatchNorm1d(3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(4, 3), torch.full((4, 3), torch.nan), torch.full((4, 3), torch.inf)):
        compiled(x)
    assert int(model[0].skipped) == 2
    assert int(model[0].num_batches_tracked) == 1
    assert model[0].running_var.isfinite().all()


def test_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        layers = bnt.BatchNorm(3), bnt.BatchNorm(), bnt.BatchNorm1d(3)
        layers[1](torch.randn(4, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in layers:
        assert layer.running_mean.dtype == layer.weight.dtype == torch.float64


@pytest.mark.parametrize(
    "layer", [bnt.BatchNorm1d(3), bnt.BatchNorm(3, activation="relu"), bnt.BatchNorm(3, device="meta")]
)
def test_checkpoints_without_a_counter(layer):
    """Of version 1, before PyTorch counted batches."""
    state = {name: torch.full((3,), 2.0) for name in ("weight", "bias", "running_mean", "running_var")}
    layer.load_state_dict(state, assign=layer.weight.is_meta)
    assert layer.num_batches_tracked == 0
    assert (layer.running_var == 2).all()


SCALARS = [
    {"momentum": torch.tensor(0.3)},
    {"eps": torch.tensor(1e-3)},
    {"momentum": 2.0},
    {"momentum": -0.5},
    {"eps": 1},
]


@pytest.mark.filterwarnings("ignore:momentum is:UserWarning")
@pytest.mark.parametrize("options", SCALARS, ids=str)
def test_scalars_that_torch_takes(options):
    ours, native = bnt.BatchNorm1d(3, **options), nn.BatchNorm1d(3, **options)
    for _ in range(3):
        x = torch.randn(6, 3) + 1
        torch.testing.assert_close(ours(x), native(x))
        torch.testing.assert_close(ours.running_var, native.running_var)
    torch._dynamo.reset()
    if not isinstance(options.get("eps", options.get("momentum")), torch.Tensor):
        torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(x), native(x))
        torch.testing.assert_close(ours.running_var, native.running_var)


def test_a_momentum_that_runs_away_is_warned_of():
    layer = bnt.BatchNorm1d(3, momentum=1.75)
    with pytest.warns(UserWarning, match=r"momentum is 1\.75") as caught:
        layer(torch.randn(4, 3))
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="momentum is nan"):
        bnt.BatchNorm1d(3, momentum=float("nan"))(torch.randn(4, 3))


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3), (1, 3, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_weights_of_other_shapes(shape, training):
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64)
    results = []
    for parameter in (weight.clone().requires_grad_(), weight.reshape(shape).clone().requires_grad_()):
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        y = bnt.batch_norm(x, mean, var, parameter, parameter, training=training)
        y.pow(3).sum().backward()
        results.append((y, parameter.grad.reshape(-1), mean))
        assert parameter.grad.shape == parameter.shape
    torch.testing.assert_close(*results)


@pytest.mark.cpu("MKL-DNN is")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_of_mkldnn():
    ours, native = bnt.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    for training in (True, False):
        mine, other = (layer.train(training)(x.to_mkldnn()).to_dense() for layer in (ours, native))
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(ours.running_var, native.running_var)
    with pytest.raises(NotImplementedError, match="training with a mask cannot be expressed by PyTorch's own"):
        ours.train()(x.to_mkldnn(), mask=torch.ones(2, 1, 4, 4, dtype=torch.bool))


@pytest.fixture
def mesh():
    """One process, which is a mesh of its own."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.cpu("the processes talk through gloo")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_tensors(mesh):
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    ours, native = (distribute_module(layer, mesh) for layer in (bnt.BatchNorm1d(3), nn.BatchNorm1d(3)))
    x = torch.randn(6, 3)
    for training in (True, True, False):
        results = []
        for layer in (ours, native):
            y = layer.train(training)(distribute_tensor(x, mesh, [Replicate()]))
            y.pow(3).sum().backward()
            results.append([t.to_local() for t in (y, layer.weight.grad, layer.running_var)])
            layer.zero_grad()
        torch.testing.assert_close(*results)


@pytest.mark.cpu("MKL-DNN's tensors are on the CPU")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arguments", [{"mask": torch.tensor([True, False]).reshape(2, 1, 1)}, {"lengths": [5, 2]}])
def test_evaluation_under_a_mask_of_a_tensor_of_mkldnn_is_refused(arguments):
    """It was evaluated as if there were no mask."""
    arguments = {name: torch.as_tensor(value) for name, value in arguments.items()}
    layer, x = bnt.BatchNorm1d(3).eval(), torch.randn(2, 3, 5)
    with pytest.raises(NotImplementedError, match="evaluation with a mask cannot be expressed by PyTorch's own"):
        layer(x.to_mkldnn(), **arguments)


@pytest.mark.cpu("MKL-DNN's tensors are on the CPU")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_evaluation_by_another_convention_of_a_tensor_of_mkldnn_is_refused():
    """Its running deviations were taken for variances."""
    layer = bnt.BatchNorm(3, convention="lasagne-gist").eval()
    with pytest.raises(NotImplementedError, match="the convention 'lasagne-gist' with these options cannot be"):
        layer(torch.randn(2, 3, 4, 4).to_mkldnn())


@pytest.mark.cpu("the processes talk through gloo")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("convention", ["pytorch", "lasagne-gist", "keras"])
@pytest.mark.parametrize("masked_output", ["zero", "normalized"])
def test_evaluation_of_distributed_tensors(mesh, convention, masked_output):
    """Any convention, under a mask, with NaN in padding."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    record = replace(bn.CONVENTIONS[convention], masked_output=masked_output, axis=1)
    layer = bnt.BatchNorm(3, convention=record, activation="sigmoid").eval()  # not 0 unless masked
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
            tensor.uniform_(0.5, 2)
    x, mask = torch.randn(6, 3, 5), torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 0])[:, None, None]
    x[1, 0, 4] = torch.nan
    expected, others = layer(x, mask=mask), copy.deepcopy(layer)
    expected.pow(2).sum().backward()
    distributed = distribute_module(others, mesh)
    placed = (distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (x, mask))
    y = distributed(next(placed), mask=next(placed))
    y.pow(2).sum().backward()
    torch.testing.assert_close(y.to_local(), expected)
    torch.testing.assert_close(others.weight.grad.to_local(), layer.weight.grad)


@pytest.mark.cpu("the processes talk through gloo")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_layers_that_are_sharded(mesh):
    """`fully_shard` gives a layer a class of its own: named in the report, and kept by `restore`."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    before, after = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    fully_shard(before[1], mesh=mesh)
    report = bnt.replace(before)
    assert report.replaced == []
    assert "fully_shard" in report.kept["1"]
    bnt.replace(after)
    fully_shard(after[1], mesh=mesh)
    after(torch.randn(2, 3, 5, 5)).sum().backward()
    assert bnt.restore(after) == ["1"]
    assert isinstance(after[1], FSDPModule)
    assert not isinstance(after[1], bnt.BatchNorm2d)
    after(torch.randn(2, 3, 5, 5)).sum().backward()
    assert after[1].num_batches_tracked == 2


def test_no_channels_and_no_examples():
    for shape in ((4, 0), (0, 0, 2)):
        assert bnt.BatchNorm1d(0)(torch.ones(shape)).shape == shape
    layer = bnt.BatchNorm1d(3)
    assert layer(torch.ones(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.ones(1, 3))


def test_importing_takes_little_longer_than_torch():
    """Dynamo, Inductor and SymPy are imported by the first call that is compiled, and not before."""
    code = "import torch, sys; before = set(sys.modules); import batchnorm.torch; print(*set(sys.modules) - before)"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "batchnorm.torch.layers" in new
    assert not {"torch._dynamo", "torch._inductor", "sympy", "torch.onnx", "torch.ao.quantization"} & set(new)
    code = "import torch, batchnorm.torch as bnt; m = torch.nn.Sequential(bnt.BatchNorm1d(3), bnt.BatchNorm(3, activation='relu'));"
    code += (
        "m(torch.randn(4, 3)).sum().backward(); m.eval()(torch.randn(4, 3)); m.train()(torch.full((2, 3), torch.nan));"
    )
    code += "import sys; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def messages(call, *arguments, **options):
    with pytest.raises(Exception) as error:  # noqa: PT011
        call(*arguments, **options)
    return error.value


X, CHANNELS = torch.randn(4, 3, 5), torch.ones(3)
WRONG = {
    "input of integers": ({"input": torch.ones(4, 3, dtype=torch.int64)}, "input has dtype torch.int64; it must be float"),
    "array": ({"input": X.cpu().numpy()}, "input is a numpy.ndarray; it must be a torch.Tensor"),
    "weight of integers": ({"weight": torch.ones(3, dtype=torch.int64)}, "weight has dtype torch.int64"),
    "weight": ({"weight": torch.ones(4)}, "weight should contain 3 elements not 4"),
    "bias": ({"bias": torch.ones(4)}, "bias should contain 3 elements not 4"),
    "running_mean": ({"running_mean": torch.ones(2), "running_var": torch.ones(3)}, "running_mean should contain 3"),
    "running_var": ({"running_mean": torch.ones(3), "running_var": torch.ones(2)}, "running_var should contain 3"),
    "shape of running_var": ({"running_mean": torch.ones(1, 3), "running_var": torch.ones(1, 3)}, "running_mean has shape (1, 3)"),
    "residual": ({"residual": torch.ones(4, 3)}, "residual has shape (4, 3); it must be that of input, (4, 3, 5)"),
    "mask of time": ({"mask": torch.ones(4, 5, dtype=torch.bool)}, "does not broadcast to input of shape (4, 3, 5): pass mask[:, None]"),
    "mask of floats": ({"mask": torch.ones(4, 1, 5)}, "mask has dtype torch.float32; it must be boolean, True where input counts"),
    "lengths": ({"lengths": torch.tensor([1, 2])}, "lengths has shape (2,); it must be (4,), one for each sequence of input"),
    "one element": ({"mask": torch.arange(4 * 5).reshape(4, 1, 5) < 1}, "input of shape (4, 3, 5) has one element per channel after masking"),
    "eps": ({"eps": -1.0}, "eps must be positive"),
    "eps 0": ({"eps": 0.0}, "eps must be positive in training, but is 0"),
    "momentum": ({"momentum": float("inf")}, "momentum is inf"),
    "activation": ({"activation": "rellu"}, "did you mean 'relu'"),
}  # fmt: skip


UNSEEN = pytest.mark.cpu("elsewhere the counts of a mask would have to be fetched")


@pytest.mark.parametrize("case", [pytest.param(c, marks=UNSEEN) if c == "one element" else c for c in WRONG])
def test_messages_name_the_arguments_of_the_call(case):
    arguments, expected = WRONG[case]
    options = {"input": X, "running_mean": None, "running_var": None, "training": True} | arguments
    error = messages(bnt.batch_norm, **options)
    assert isinstance(error, (ValueError, TypeError))
    assert expected in str(error)
    for word in ("gamma", "beta", "decay", "axis=", "spread", " x ", "clamp"):
        assert word not in str(error)


@pytest.mark.cpu("elsewhere a warning would wait for the device")
def test_the_warning_of_a_bad_batch():
    """It names the layer, points at the user's line, and appears once for each layer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    bnt.replace(model)
    with pytest.warns(RuntimeWarning) as caught:
        model(torch.full((4, 3), torch.nan))
    assert [re.search(r"running statistics of ([\w.]+);", str(w.message))[1] for w in caught] == ["1.0", "2"]
    assert {w.filename for w in caught} == {__file__}
    assert "batchnorm.torch.report(model)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.full((4, 3), torch.nan))
    assert [layer.skipped for layer in bnt.report(model).layers] == [2, 2]
    masked = bnt.BatchNorm1d(3)
    with pytest.warns(RuntimeWarning, match="the statistics of a batch are not finite") as caught:
        masked(torch.full((4, 3, 2), torch.nan), mask=torch.ones(4, 1, 2, dtype=torch.bool))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert int(masked.skipped) == 1
