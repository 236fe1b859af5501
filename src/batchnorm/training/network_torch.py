"""LeNet in PyTorch."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.torch import BatchNorm, no_update
from batchnorm.training.data import Floats, Labels
from batchnorm.training.network import (
    DECAY,
    HIDDEN,
    LAYERS,
    Arrays,
    Probe,
    Score,
    StepResult,
    check_state,
    initial_weights,
)
from batchnorm.training.options import Options

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": functional.relu,
    "leaky_relu": partial(functional.leaky_relu, negative_slope=0.01),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "identity": nn.Identity(),
}


class LeNet(nn.Module):
    """LeNet as a PyTorch module; the submodules of a layer are `conv1`, `norm_conv1` and so on."""

    def __init__(self, weights: dict[str, Floats], activation: str, *, batch_norm: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        for layer in LAYERS:
            normalized = batch_norm and layer in HIDDEN
            if layer.kernel:
                module: nn.Module = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, bias=not normalized)
            else:
                module = nn.Linear(layer.inputs, layer.outputs, bias=not normalized)
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(torch.from_numpy(weights[layer.name]) if name == "weight" else torch.zeros(()))
            self.add_module(layer.name, module)
            if layer in HIDDEN:
                norm = BatchNorm(layer.outputs, convention="flax", momentum=1 - DECAY) if batch_norm else nn.Identity()
                self.add_module(f"norm_{layer.name}", norm)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, and the values before and after each batch norm."""
        x = images[:, None]
        before, after = [], []
        for layer in HIDDEN:
            if not layer.kernel:
                x = x.flatten(1)
            before.append(self.get_submodule(layer.name)(x))
            after.append(self.get_submodule(f"norm_{layer.name}")(before[-1]))
            x = self.activation(after[-1])
            if layer.kernel:
                x = functional.avg_pool2d(x, 2)
        return self.get_submodule(LAYERS[-1].name)(x), before, after


class TorchNetwork:
    """A `Network` in PyTorch."""

    def __init__(self, options: Options, *, batch_norm: bool) -> None:
        self.model = LeNet(initial_weights(options.seed), options.activation, batch_norm=batch_norm)
        self.optimizer = torch.optim.Adam(self.model.parameters(), options.learning_rate)
        self.norms = {name: module for name, module in self.model.named_modules() if isinstance(module, BatchNorm)}

    def step(self, images: Floats, labels: Labels) -> StepResult:
        """See `Network`."""
        self.model.train()
        logits, loss = self._loss(images, labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return StepResult(loss.item(), int(_right(logits, labels).sum()))

    def evaluate(self, images: Floats, labels: Labels, *, training: bool) -> Score:
        """See `Network`."""
        self.model.train(training)
        with no_update(self.model), torch.no_grad():
            logits, loss = self._loss(images, labels)
        return Score(loss.item(), _right(logits, labels))

    def probe(self, images: Floats, labels: Labels) -> Probe:
        """See `Network`."""
        self.model.train()
        weights = {layer.name: self.model.get_submodule(layer.name).get_parameter("weight") for layer in LAYERS}
        with no_update(self.model):
            logits, before, after = self.model(torch.from_numpy(images))
            gradients = torch.autograd.grad(functional.cross_entropy(logits, _targets(labels)), list(weights.values()))
        names = [layer.name for layer in HIDDEN]
        return Probe(
            dict(zip(names, map(_channels_last, before), strict=True)),
            dict(zip(names, map(_channels_last, after), strict=True)),
            {name: gradient.norm().item() for name, gradient in zip(weights, gradients, strict=True)},
        )

    def gamma_beta(self) -> dict[str, tuple[Floats, Floats]]:
        """See `Network`."""
        return {
            name.removeprefix("norm_"): (norm.weight.detach().numpy().copy(), norm.bias.detach().numpy().copy())
            for name, norm in self.norms.items()
        }

    def state(self) -> Arrays:
        """See `Network`."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"parameters.{name}"] = parameter.detach()
            # Adam creates its moments with the first step; until then they are zero.
            moments = self.optimizer.state.get(parameter) or _adam_start(parameter.detach())
            for moment, value in moments.items():
                tensors[f"adam.{name}.{moment}"] = value
        for name, buffer in self.model.named_buffers():
            tensors[f"running.{name}"] = buffer
        return {name: tensor.numpy().copy() for name, tensor in tensors.items()}

    def restore(self, state: Arrays) -> None:
        """See `Network`."""
        check_state(state, self.state())
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        for name, parameter in self.model.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameters.{name}"])
            self.optimizer.state[parameter] = {
                moment: tensors[f"adam.{name}.{moment}"] for moment in _adam_start(parameter.detach())
            }
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"running.{name}"])

    def _loss(self, images: Floats, labels: Labels) -> tuple[Tensor, Tensor]:
        logits, _, _ = self.model(torch.from_numpy(images))
        return logits, functional.cross_entropy(logits, _targets(labels))


def _targets(labels: Labels) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))  # cross_entropy requires int64


def _right(logits: Tensor, labels: Labels) -> NDArray[np.bool_]:
    right: NDArray[np.bool_] = logits.argmax(1).numpy() == labels
    return right


def _channels_last(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().movedim(1, -1).numpy())


def _adam_start(parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's moments before the first step."""
    return {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
