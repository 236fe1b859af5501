"""The cases that PyTorch's own tests define for its batch norms, on ours."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import batchnorm.torch as bnt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

MODULES = [info for info in module_db if info.module_cls.__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")]
(OPERATOR,) = (info for info in op_db if info.name == "nn.functional.batch_norm" and not info.variant_test_name)


def samples(info, *, training):
    return info.module_inputs_func(
        info, device=torch.get_default_device(), dtype=torch.float64, requires_grad=True, training=training
    )


def module_cases():
    for info in MODULES:
        for training in (True, False):
            for index in range(len(samples(info, training=training))):
                yield pytest.param(info, training, index, id=f"{info.module_cls.__name__}-{training}-{index}")


def small(x):
    """A part of the input that is quick to perturb element by element."""
    part = x.detach()[tuple(slice(None) if axis == 1 else slice(3 if axis == 0 else 2) for axis in range(x.ndim))]
    return part.clone().requires_grad_()


def layers(info, sample, *, training):
    arguments = sample.constructor_input
    options = {"dtype": torch.float64} | arguments.kwargs
    ours = getattr(bnt, info.module_cls.__name__)(*arguments.args, **options).train(training)
    theirs = info.module_cls(*arguments.args, **options).train(training)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(("info", "training", "index"), list(module_cases()))
def test_modules(info, training, index):
    sample = samples(info, training=training)[index]
    ours, theirs = layers(info, sample, training=training)
    (x,) = sample.forward_input.args
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    gradients = (torch.autograd.grad(r, [x, *m.parameters()], dy) for r, m in ((y, ours), (expected, theirs)))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
    if x.numel():
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
        assert gradcheck(copy.deepcopy(ours), small(x), check_forward_ad=True)
        assert gradgradcheck(copy.deepcopy(ours), small(x))


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_errors_of_modules(info):
    for case in info.module_error_inputs_func(
        info, device=torch.get_default_device(), dtype=torch.float64, requires_grad=False, training=True
    ):  # fmt: skip
        arguments, inputs = case.module_error_input.constructor_input, case.module_error_input.forward_input
        layer = getattr(bnt, info.module_cls.__name__)(*arguments.args, **arguments.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*inputs.args, **inputs.kwargs)


@pytest.mark.filterwarnings("ignore:momentum is -1.0:UserWarning")
@pytest.mark.parametrize("index", range(12))
def test_samples_of_the_function(index):
    sample = list(OPERATOR.sample_inputs(torch.get_default_device(), torch.float64, requires_grad=True))[index]

    def call(function, x, *parameters):
        """With copies of the running statistics, which are changed in place."""
        mean, var = (value if value is None else value.detach().clone() for value in sample.args[:2])
        return function(x, mean, var, *parameters, **sample.kwargs)

    parameters = sample.args[2:]
    native = torch.nn.functional.batch_norm
    y, expected = call(bnt.batch_norm, sample.input, *parameters), call(native, sample.input, *parameters)
    torch.testing.assert_close(y, expected)
    inputs = [t for t in (sample.input, *parameters) if t is not None and t.requires_grad]
    dy = torch.randn_like(y)
    for mine, other in zip(*(torch.autograd.grad(r, inputs, dy) for r in (y, expected)), strict=True):
        torch.testing.assert_close(mine, other)
    if sample.input.numel():
        function, x = partial(call, bnt.batch_norm), small(sample.input)
        assert gradcheck(lambda x: function(x, *parameters), x, check_forward_ad=True)
        assert gradgradcheck(lambda x: function(x, *parameters), x)


def test_all_samples_are_there():
    assert len(list(OPERATOR.sample_inputs(torch.get_default_device(), torch.float64))) == 12
    assert len(MODULES) == 3
