"""Deferred results are right whatever the code of the model does with them."""

import copy
import gc
import weakref

import pytest
import torch
from blocks import Block, Kept, Residual, Square, assert_same_steps, fused_layers, images
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bnt
from batchnorm.torch import waiting
from batchnorm.torch.deferred import Deferred

pytestmark = pytest.mark.cpu("results wait for what follows on")


@pytest.fixture(autouse=True)
def small_tensors_wait_too(monkeypatch):
    monkeypatch.setattr("batchnorm.torch.waiting.smallest", 1)


def test_a_change_in_place_before_the_activation_is_refused():
    """The result can no longer be computed: an error like autograd's for saved tensors, not a wrong number."""

    class Network(Block):
        def forward(self, x):
            z = self.bn(x)
            if not self.flag:
                x.add_(1)
            return self.act(z)

    network = Network()
    assert bnt.replace(network, fuse=True, example=images().float()).fused == {"bn": "relu"}
    network.flag = False
    with pytest.raises(RuntimeError, match=r"fused batch norm 'bn'.*changed in place"):
        network(images().float())
    bnt.restore(network)
    network(images().float())


def test_a_change_in_place_that_the_example_shows():
    """Autograd allows it, because an addition saves none of its terms."""

    class Network(Residual):
        def forward(self, x):
            other = 2 * x
            z = self.bn2(self.second(super().forward(x))) + other
            other.add_(1)
            return self.act(z)

    network = Network().double()
    native = copy.deepcopy(network)
    report = bnt.replace(network, fuse=True, example=images())
    assert "changed in place" in report.unfused["bn2"]
    assert report.fused == {"bn": "relu"}
    assert_same_steps(network, native)


@torch.jit.script
def scripted_swish(z):
    return z * z.sigmoid()


class PastPython(Residual):
    """The consumers of the result bypass PyTorch's Python functions: a script, and autograd functions."""

    def forward(self, x):
        out = self.bn2(self.second(self.act(self.bn(self.conv(x)))))
        identity = self.down(x)
        if self.flag == "script":
            return scripted_swish(out) + scripted_swish(out + identity)
        if self.flag == "function":
            return Square.apply(out) + Square.apply(out + identity)
        if self.flag == "in place":
            out += identity
            out.relu_()
            return Square.apply(out)
        if self.flag == "sum in place":
            out.add_(identity)
            return Square.apply(out)
        return self.act(out + identity)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("flag", ["script", "function", "in place", "sum in place"])
def test_past_the_python_interface(flag):
    """Numbers and gradients are right although the consumers bypass PyTorch's Python functions."""
    torch.manual_seed(0)
    ours = PastPython().double()
    native = copy.deepcopy(ours)
    assert bnt.replace(ours, fuse=True, example=images()).fused == {"bn": "relu", "bn2": "add+relu"}
    assert_same_steps(ours, native)
    ours.flag = native.flag = flag
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images()), native.eval()(images()))
    assert_same_steps(ours, native)
    torch.manual_seed(0)
    unfused = copy.deepcopy(native)  # an example that shows it
    report = bnt.replace(unfused, fuse=True, example=images())
    assert report.fused == {"bn": "relu"} | ({"bn2": "add+relu"} if flag == "in place" else {})
    assert_same_steps(unfused, native)


class Dirty(torch.autograd.Function):
    """Changes its argument in place."""

    @staticmethod
    def forward(ctx, z):
        z.mul_(3)
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx, dy):
        return 3 * dy


def kept(m, x):
    m.last = m.z(x)
    return x


def in_another_order(m, x):
    first, second = m.z(x), m.z(2 * x + 1)
    return m.act(second) + m.act(first)


def failing(m, x):
    try:
        z = m.z(x)
        raise KeyError(z)
    except KeyError as error:
        m.error = error
    return x


def read_in_backward(m, x):
    z, y = m.z(x), x * 2
    y.register_hook(lambda dy: dy * z.detach())
    return y


def dropped_and_changed(m, x):
    h = m.conv(x)
    z = m.bn(h)
    del z
    h.detach().add_(1)
    return x * 2


def running_mean_between(m, x):
    z = m.z(x)
    return m.act(z) * m.bn.running_mean.sum() * copy.deepcopy(m.bn).running_var.sum()


def scaled_in_place(m, x):
    z = m.z(x)
    z.mul_(3)
    return Square.apply(z)


def written_in_place(m, x):
    z = m.z(x)
    z[0] = 2
    z[:, 1].mul_(2)
    return Square.apply(z)


def hooked(m, x):
    z = m.z(x)
    z.register_hook(lambda dy: dy * 2)
    return Square.apply(z) + m.act(z)


def dirty(m, x):
    return m.act(Dirty.apply(m.z(x)))


def checkpointed(change):
    def tail(m, x):
        def function(x):
            z = m.z(x)
            change(z)
            return z

        return checkpoint(function, x, use_reentrant=True) * x

    return tail


def looked_at_in_inference_mode(m, x):
    z = m.z(x)
    with torch.inference_mode():
        float(z.mean())
    return m.act(z) + x


def hook_on_the_input(m, x):
    h = m.conv(x)
    if h.requires_grad:
        h.register_hook(lambda dy: dy * 2)
    return Square.apply(m.bn(h))


def recurrent(m, x):
    return Square.apply(m.bn(m.bn(x).sin()))


def residual_of_the_input(m, x):
    return Square.apply(m.z(x) + x)


def frozen_parameters(m, x):
    m.bn.requires_grad_(False)
    z = m.z(x)
    m.bn.requires_grad_(True)
    return m.act(z)


def other_arguments(m, x):
    z = m.z(x)
    y = torch.relu(input=z) + torch.add(input=m.z(x), other=x) + torch.add(m.z(x), x, alpha=2)
    with torch.no_grad():
        torch.sigmoid(m.z(x), out=torch.empty_like(x))
    return y + functional.gelu(input=m.z(x)) + functional.leaky_relu(m.z(x).exp(), float("inf"))


def transformed(m, x):
    z = m.z(x)
    rows = torch.stack([x, 2 * x])
    return torch.vmap(lambda r: m.act(z + r))(rows).sum(0) + torch.func.jvp(lambda r: z + r, (x,), (x,))[1]


def attributes(m, x):
    z = m.z(x)
    z.tag = 3
    z *= x
    assert functional.relu(z, inplace=True) is z
    return z * z.tag


def twice_the_same(m, x):
    z = m.z(x)
    y = z * z + torch.cat([z, z])[: len(z)]
    for tail in (lambda z: z + z, lambda z: z.add_(z), lambda z: z - z * z):
        y = y + tail(m.z(x))
    return y


def hook_between_sum_and_parts(m, x):
    z = m.z(x)
    z.register_hook(lambda dy: dy * 3)
    return m.act(z + x)


def first_looked_at_without_gradient(look):
    def tail(m, x):
        z = checkpoint(lambda t: m.z(t) + t, x, use_reentrant=True)
        with look():
            z.mean()
        return z.pow(2)

    return tail


def functionalized(m, x):
    z = m.z(x)
    torch.func.functionalize(lambda t: z + t)(x.detach())
    make_fx(lambda t: m.z(x) * t)(x.detach())
    return m.act(z)


def hooked_after_a_script(m, x):
    z = m.z(x)
    y = scripted_swish(z)
    if y.requires_grad:
        z.register_hook(lambda dy: dy * 3)
    return y


class OnlyShape(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return torch.ones(z.shape, dtype=z.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy * 5


def hooked_after_a_function(m, x):
    z = m.z(x)
    y = OnlyShape.apply(z)
    if y.requires_grad:
        z.register_hook(lambda dy: dy * 3)
    return y + x


def gradient_of_the_pre_activation(m, x):
    z = m.z(x)
    z.retain_grad() if z.requires_grad else None
    y = m.act(z)
    if y.requires_grad:
        y.sum().backward(retain_graph=True)
        m.zero_grad()
        return y * z.grad + x
    return y


def held_by_a_weak_reference(m, x):
    z = m.z(x)
    reference = weakref.ref(z)
    y = m.act(z) + z.sin() + Square.apply(z)
    assert reference() is z
    return y


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z * 1

    @staticmethod
    def backward(ctx, dy):
        return None


def without_a_gradient(m, x):
    return NoGradient.apply(m.z(x)) + x


def sparse_and_other_summands(m, x):
    return m.act(m.z(x) + x.detach().to_sparse()) + m.act(m.z(x) + torch._efficientzerotensor(x.shape, dtype=x.dtype))


def hook_on_a_summand(m, x):
    z = m.z(x)
    total = z + x
    z.register_hook(lambda dy: dy * 3)
    return m.act(total)


def held_and_changed(m, x):
    z = m.z(x)
    reference = weakref.ref(z)
    z[:, 0].mul_(3)
    return Square.apply(z) * len(reference())


@torch.jit.script
def view_in_place(z):
    view = z[:, 0]
    view.mul_(3.0)
    return z * 1.0


def view_changed_past_python(m, x):
    return view_in_place(m.z(x))


def dirty_after_a_checkpoint(m, x):
    return Dirty.apply(checkpoint(lambda t: m.z(t), x, use_reentrant=True)).pow(2)


def hook_after_the_activation(m, x):
    z = m.z(x)
    y = m.act(z)
    z.register_hook(lambda dy: dy * 2)
    return y


def gradient_for_the_pre_activation(m, x):
    z = m.z(x)
    y = m.act(z)
    return x + sum(t.sum() for t in torch.autograd.grad(y.sum(), z, allow_unused=True) if t is not None)


def gradient_taken_away(m, x):
    z = m.z(x)
    m.bn.requires_grad_(False)
    y = m.act(z)
    m.bn.requires_grad_(True)
    return y


#: Valid uses of a result that differ from the example's.
TAILS = [
    kept, in_another_order, failing, read_in_backward, dropped_and_changed, running_mean_between, scaled_in_place,
    written_in_place, hooked, checkpointed(lambda z: z.relu_()), checkpointed(lambda z: z.mean()),
    checkpointed(lambda z: z.mul_(2)), checkpointed(lambda z: None), looked_at_in_inference_mode, hook_on_the_input,
    recurrent, residual_of_the_input, frozen_parameters, other_arguments, transformed, attributes, twice_the_same,
    hook_between_sum_and_parts, first_looked_at_without_gradient(torch.no_grad),
    first_looked_at_without_gradient(torch.inference_mode), functionalized, hooked_after_a_script,
    hooked_after_a_function, gradient_of_the_pre_activation, held_by_a_weak_reference, sparse_and_other_summands,
    view_changed_past_python, without_a_gradient,
]  # fmt: skip

#: Uses that cannot give right results, and raise.
REFUSED = [
    dirty, hook_after_the_activation, gradient_for_the_pre_activation, gradient_taken_away, hook_on_a_summand,
    held_and_changed, dirty_after_a_checkpoint,
]  # fmt: skip


class Tail(Block):
    def __init__(self, tail):
        super().__init__()
        self.tail = tail

    def z(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        return super().forward(x) if self.flag else self.tail(self, x)


def with_tail(tail):
    torch.manual_seed(0)
    ours = Tail(tail).double()
    native = copy.deepcopy(ours)
    assert bnt.replace(ours, fuse=True, example=images()).fused == {"bn": "relu"}
    bnt.replace(native)  # not fused; reentrant checkpoints advance PyTorch's own layers twice
    ours.flag = native.flag = False
    return ours, native


@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: tail.__qualname__.partition(".")[0])
def test_whatever_the_example_did_not_show(tail):
    ours, native = with_tail(tail)
    assert_same_steps(ours, native)
    if tail.__name__ == "tail":  # a reentrant checkpoint has no second derivatives
        return
    x, seconds = images().requires_grad_(), []
    for network in (ours, native):
        (dx,) = torch.autograd.grad(network.eval()(x).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(dx.pow(2).sum(), x)[0])
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("tail", REFUSED, ids=lambda tail: tail.__name__)
def test_uses_that_cannot_be_right_are_refused(tail):
    ours, _ = with_tail(tail)
    with pytest.raises(RuntimeError, match="whose result waits to be used"):
        ours(images().requires_grad_()).pow(2).sum().backward()


def test_a_recomputation_that_is_another_is_refused():
    """The checkpoint refuses it, because the tensor outside has been computed in the meantime."""

    def tail(m, x):
        z = m.z(x)
        y = checkpoint(lambda t: m.act(z) * t, x, use_reentrant=False)
        return y + z * 2

    ours, _ = with_tail(tail)
    with pytest.raises(Exception, match="number of tensors was saved"):
        ours(images().requires_grad_()).pow(2).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_deferred_tensor_enters_a_compiled_function(backend):
    torch._dynamo.reset()
    ours, native = with_tail(None)
    function = torch.compile(lambda z: z.sin() * 2, backend=backend)
    for network in (ours, native):
        network.tail = lambda m, x: function(m.z(x))
    for _ in range(2):
        assert_same_steps(ours, native)


def test_a_weight_that_is_computed_is_computed_once():
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return weight + Counted.calls

    network = Block().double()
    bnt.replace(network, fuse=True, example=images())
    nn.utils.parametrize.register_parametrization(network.bn, "weight", Counted())
    before = Counted.calls
    network(images())
    assert Counted.calls == before + 1


def test_unsupported_calls_are_computed_at_once():
    """With the errors and the results of an unfused layer."""
    network = Block().double()
    bnt.replace(network, fuse=True, example=images())
    with pytest.raises(RuntimeError, match="should contain 3 elements not 4"):
        network.bn(images()[:, :3])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network.bn(images()[:1, :, :1, :1])
    network.bn.weight = nn.Parameter(torch.ones(4, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(network.bn(images()), nn.BatchNorm2d(4).double()(images()))
    assert network.bn(images()[:0]).shape == (0, 4, 5, 5)


def test_absent_memory_cannot_be_read():
    ours, _ = with_tail(lambda m, x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(m.z(x))))
    with pytest.raises(RuntimeError), torch.no_grad():
        ours(images())


def test_nothing_is_left_behind():
    """Neither calls nor tensors remain, with the garbage collector off."""
    network = Residual().double()
    bnt.replace(network, fuse=True, example=images())
    gc.collect()
    gc.disable()
    try:
        before = number_of_waiting()
        for _ in range(3):
            network(images().requires_grad_()).sum().backward()
        assert number_of_waiting() == before
    finally:
        gc.enable()


def number_of_waiting():
    return sum(type(thing) in (Deferred, waiting.DeferredCall) for thing in gc.get_objects())


def test_results_that_are_kept():
    """Results that are read after the forward pass have the right gradient, and enter the statistics once."""
    torch.manual_seed(0)
    ours = Kept().double()
    native = copy.deepcopy(ours)
    bnt.replace(ours)
    ours.bn.fused = "relu"  # although replace() would not fuse it
    gradients = []
    for network in (ours, native):
        y = network(images())
        (y.sum() + network.pre.pow(3).sum()).backward()
        gradients.append(network.conv.weight.grad)
        assert network.bn.num_batches_tracked == 1
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(ours.all[0].sum(), native.all[0].sum())
    del ours.pre, ours.all, y
    gc.collect()
    torch.testing.assert_close(ours.bn.running_mean, native.bn.running_mean)


def test_in_half_precision_and_without_autograd():
    torch.manual_seed(0)
    ours = Residual()
    native = copy.deepcopy(ours)
    bnt.replace(ours, fuse=True, example=images().float())
    x = images().float()
    ours(x), native(x)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            mine, other = (n.eval().to(dtype)(x.to(dtype)) for n in (ours, native))
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=5e-2 if dtype != torch.float32 else 1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x.to(dtype)), native(x.to(dtype)), rtol=2e-2, atol=5e-2)


def test_second_derivatives_and_transformations():
    torch.manual_seed(0)
    ours = Residual().double()
    native = copy.deepcopy(ours)
    bnt.replace(ours, fuse=True, example=images())
    x, results = images().requires_grad_(), []
    for network in (ours, native):
        (dx,) = torch.autograd.grad(network(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.pow(2).sum(), x)
        results.append(second)
    torch.testing.assert_close(*results)
    jacobians = [torch.func.grad(lambda x, n=n: n(x).pow(2).sum())(images()) for n in (ours.eval(), native.eval())]
    torch.testing.assert_close(*jacobians)
    assert list(fused_layers(ours).values()).count(None) == 1
