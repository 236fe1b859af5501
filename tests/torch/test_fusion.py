"""Fusion of batch norms with the operations after them, which a run on an example shows."""

import copy
import pickle
import threading

import pytest
import torch
from blocks import Block, Kept, Residual, Square, assert_same_steps, fused_layers, images
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bnt
from batchnorm.torch import waiting
from batchnorm.torch.deferred import Deferred

pytestmark = pytest.mark.cpu("results wait for what follows on")


@pytest.fixture(autouse=True)
def small_tensors_wait_too(monkeypatch):
    monkeypatch.setattr("batchnorm.torch.waiting.smallest", 1)


class Functional(Block):
    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)))


class InPlace(Block):
    def forward(self, x):
        x = self.bn(self.conv(x))
        x.relu_()
        return x * 2


class ResidualFirst(Residual):
    def forward(self, x):
        out = self.bn2(self.second(functional.silu(self.bn(self.conv(x)))))
        return functional.hardswish(self.down(x).add(out))


class Shared(nn.Module):
    """One batch norm in two blocks, one of which has no activation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.second.bn, self.second.act = self.first.bn, nn.Identity()

    def forward(self, x):
        return self.second(self.first(x))


class Inside(nn.Module):
    """A parent that calls the parts of a block, and the block."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x) + self.block.bn(self.block.conv(x))


class SecondName(Block):
    def __init__(self):
        super().__init__()
        self.norm = self.bn

    def forward(self, x):
        return self.norm(super().forward(x))


class OtherMethod(Block):
    def features(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return self.act(self.features(x)) if self.flag else self.features(x)


class OnlyTraining(Block):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.act(x) if self.training else x


class OnlyEvaluation(Block):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.training else self.act(x)


class Branch(Block):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.act(x) if self.flag else x.sigmoid() + x


class SizeOfBatch(Block):
    """The operation after the batch norm depends on the input."""

    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.act(z) if len(x) == 6 else z


class TwoUses(Block):
    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.act(z) + z


class Gated(Block):
    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.act(z) * z


class OwnFunction(Block):
    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.act(z) if self.flag else Square.apply(z)


class Reentrant(Block):
    def forward(self, x):
        if self.flag:
            return self.act(self.bn(self.conv(x)))
        return self.act(checkpoint(lambda x: self.bn(self.conv(x)), x, use_reentrant=True))


class Plain(Block):
    def forward(self, x):
        return self.act(checkpoint(lambda x: self.bn(self.conv(x)), x, use_reentrant=False))


class Dropped(Block):
    """An unused result advances the running statistics too."""

    def forward(self, x):
        z = self.bn(self.conv(x))
        return self.act(z) if self.flag else x * 3


class WithoutGradient(Block):
    def forward(self, x):
        with torch.no_grad():
            z = self.bn(self.conv(x))
        return self.act(z) * x


#: Every network, and what is fused in it: (in training and evaluation both)
NETWORKS = {
    Block: {"bn": "relu"},
    Functional: {"bn": "relu"},
    InPlace: {"bn": "relu"},
    Residual: {"bn": "relu", "bn2": "add+relu"},
    ResidualFirst: {"bn": "silu", "down.1": "add+hardswish"},
    Shared: {},
    Inside: {},
    SecondName: {},
    OtherMethod: {"bn": "relu"},
    Kept: {},
    OnlyTraining: {},
    OnlyEvaluation: {},
    Branch: {"bn": "relu"},
    SizeOfBatch: {"bn": "relu"},
    TwoUses: {},
    Gated: {},
    OwnFunction: {"bn": "relu"},
    Reentrant: {"bn": "relu"},
    Plain: {"bn": "relu"},
    Dropped: {"bn": "relu"},
    WithoutGradient: {},
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_equals_the_native_network_whatever_its_code_does(kind):
    torch.manual_seed(0)
    ours = kind().double()
    native = copy.deepcopy(ours)
    report = bnt.replace(ours, fuse=True, example=images())
    if kind in (Reentrant, Plain):  # where PyTorch's layers advance the running statistics twice
        bnt.replace(native)
    assert report.fused == NETWORKS[kind]
    assert set(report.fused) | set(report.unfused) == set(report.replaced)
    assert_same_steps(ours, native)
    assert_same_steps(ours, native, number=3)  # another batch than the example
    for network in (ours, native):  # another branch than the example took
        for module in network.modules():
            if hasattr(module, "flag"):
                module.flag = False
    assert_same_steps(ours, native)
    assert not any(isinstance(value, Deferred) for m in ours.modules() for value in vars(m).values())
    if kind is not Kept:  # of which PyTorch's own cannot be copied
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert fused_layers(copied) == fused_layers(ours)
    bnt.restore(ours), bnt.restore(native)
    assert [type(m) for m in ours.modules()] == [type(m) for m in native.modules()]
    assert_same_steps(ours, native)


ACTIVATIONS = {
    "relu": nn.ReLU(), "relu6": nn.ReLU6(), "leaky_relu(0.2)": nn.LeakyReLU(0.2), "silu": nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish(), "gelu": nn.GELU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), None: nn.GELU("tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS, ids=str)
def test_activations(name):
    ours = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), ACTIVATIONS[name]).double()
    native = copy.deepcopy(ours)
    assert bnt.replace(ours, fuse=True, example=images()).fused == ({"1": name} if name else {})
    assert_same_steps(ours, native)


def test_one_kernel_computes_it_all():
    """The sum and the activation are not separate operations in the graph."""
    network = Residual().double()
    bnt.replace(network, fuse=True, example=images())
    y = network(images().requires_grad_())
    assert type(y) is torch.Tensor
    assert y.grad_fn.name() == "NormalizationBackward"
    residual = y.grad_fn.next_functions[3][0]
    assert residual.name() == "NormalizationBackward"  # the batch norm of the shortcut


def test_small_tensors_do_not_wait(monkeypatch):
    """Deferring them would cost more than the pass over memory that it saves."""
    network = Block().double()
    assert bnt.replace(network, fuse=True, example=images()).fused == {"bn": "relu"}
    x = network.conv(images())
    monkeypatch.setattr("batchnorm.torch.waiting.smallest", x.numel() + 1)
    assert type(network.bn(x)) is torch.Tensor
    monkeypatch.setattr("batchnorm.torch.waiting.smallest", x.numel())
    assert type(network.bn(x)) is Deferred


def test_a_model_that_runs_on_keywords_and_returns_a_dictionary():
    class Network(Block):
        def forward(self, *, pixels, scale):
            return {"features": super().forward(pixels) * scale, "label": "none"}

    ours = Network().double()
    native = copy.deepcopy(ours)
    report = bnt.replace(ours, fuse=True, example={"pixels": images().float(), "scale": 3})
    assert report.fused == {"bn": "relu"}
    x = images(seed=4)
    torch.testing.assert_close(*(n(pixels=x, scale=2)["features"] for n in (ours, native)))


def test_dropout_and_the_state_of_random_numbers():
    ours = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)).double()
    native = copy.deepcopy(ours)
    state = torch.get_rng_state()
    assert bnt.replace(ours, fuse=True, example=images()).fused == {"1": "relu"}
    assert torch.equal(torch.get_rng_state(), state)
    for network in (ours, native):
        torch.manual_seed(3)
        network.y = network(images())
    torch.testing.assert_close(ours.y, native.y)


def test_the_model_is_not_run():
    network = Block()
    bnt.replace(network, fuse=True, example=images().float())
    assert network.bn.num_batches_tracked == 0
    assert network.conv.weight.grad is None
    assert network.training
    assert network.conv.weight.dtype == torch.float32


@pytest.mark.parametrize("place", ["bn", "act"])
def test_hooks_see_what_they_would_see(place):
    seen = {}
    torch.manual_seed(0)
    ours = Block().double()
    native = copy.deepcopy(ours)
    bnt.replace(ours, fuse=True, example=images())
    for key, network in (("ours", ours), ("native", native)):
        module = getattr(network, place)
        module.register_forward_hook(lambda _, inputs, y, key=key: seen.update({key: (inputs[0] * 1, y * 1)}))
        module.register_full_backward_hook(lambda _, dx, dy, key=key: seen.update({key + " gradients": (dx, dy)}))
        network(images().requires_grad_()).pow(3).sum().backward()
    torch.testing.assert_close(seen["ours"], seen["native"])
    torch.testing.assert_close(seen["ours gradients"], seen["native gradients"])


def test_a_layer_with_hooks_is_left_alone():
    network = Block()
    network.bn.register_forward_hook(lambda *_: None)
    report = bnt.replace(network, fuse=True, example=images().float())
    assert report.unfused == {"bn": "it is not called with the example on the CPU, or is watched by hooks"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_calls_do_not_wait(backend, training):
    torch._dynamo.reset()
    torch.manual_seed(0)
    ours = Residual().double()
    native = copy.deepcopy(ours)
    bnt.replace(ours, fuse=True, example=images())
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    for seed in range(3):
        results = []
        for call, network in ((compiled, ours), (native, native)):
            network.train(training).zero_grad()
            call(images(seed=seed)).pow(2).sum().backward()
            results.append([p.grad.clone() for p in network.parameters()])
        torch.testing.assert_close(*results)
    assert torch.export.export(ours, (images(),), strict=True)


def test_threads_that_fuse_at_once():
    """Each sees its own calls, and none leaves anything behind."""
    network, found = Residual().double(), []

    def replaced():
        for _ in range(5):
            found.append(bnt.replace(copy.deepcopy(network), fuse=True, example=images()).fused)  # noqa: PERF401

    threads = [threading.Thread(target=replaced) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"bn": "relu", "bn2": "add+relu"}] * 15
    assert waiting.recorder.records is None


def test_fusing_again_goes_by_the_new_example():
    network = Branch().double()
    assert bnt.replace(network, fuse=True, example=images()).fused == {"bn": "relu"}
    network.flag = False
    assert bnt.replace(network, fuse=True, example=images()).fused == {}
    assert network.bn.fused is None


def test_fusion_needs_an_example():
    network = Block()
    with pytest.raises(ValueError, match="fuse=True needs example="):
        bnt.replace(network, fuse=True)
    with pytest.raises(ValueError, match=r"cannot be run on the example.*input to conv2d"):
        bnt.replace(network, fuse=True, example=torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"cannot be run on the example.*more than 1 value per channel"):
        bnt.replace(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), fuse=True, example=torch.randn(1, 4))
    assert type(network.bn) is nn.BatchNorm2d
    with pytest.raises(TypeError, match=r"model is a int; it must be a torch.nn.Module"):
        bnt.replace(3)


def test_folding_by_pytorch_leaves_the_activation_where_it_is():
    """A fused layer is a batch norm and nothing else; the model's code still applies the activation."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    bnt.replace(network, fuse=True, example=images())
    network(images())
    expected = network.eval()(images(2))
    network[0], network[1] = fuse_conv_bn_eval(network[0], network[1]), nn.Identity()
    torch.testing.assert_close(network(images(2)), expected)


@pytest.mark.parametrize(
    "layer",
    [bnt.BatchNorm(4, activation="relu"), bnt.BatchNorm(4, convention="lasagne-gist")],
    ids=["activation", "convention"],
)
def test_folding_what_cannot_be_folded_is_refused(layer):
    with pytest.raises(ValueError, match=r"cannot be folded into another layer"):
        fuse_conv_bn_eval(nn.Conv2d(4, 4, 3).eval(), layer.eval())
    with pytest.raises(ValueError, match=r"cannot be folded into another layer"):
        layer.weight.div(torch.sqrt(layer.eps + layer.running_var))
    assert float(layer.eps) in (1e-5, 0.01)
    plain = bnt.BatchNorm(4).eval()
    conv = nn.Conv2d(4, 4, 3).eval()
    torch.testing.assert_close(fuse_conv_bn_eval(conv, plain)(images().float()), plain(conv(images().float())))
