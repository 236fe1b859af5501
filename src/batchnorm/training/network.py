"""LeNet for both frameworks: its layers, its initial weights, and the interface that the loop uses.

    (1, 28, 28) - conv1 6@5x5 - BN - activation - average pool 2x2
                - conv2 16@5x5 - BN - activation - average pool 2x2
                - dense1 120 - BN - activation - dense2 84 - BN - activation - dense3 10

Without batch norm each layer has a bias; with it, beta takes the bias's place: batch norm subtracts the mean, so a bias
before it changes nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from batchnorm.training.data import Floats, Labels
from batchnorm.training.options import Options

DECAY = 0.9  # of the running statistics: about ten batches, because the weights still change

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Layer:
    """A layer with weights: `kernel` pixels square for a convolution, 0 for a dense one."""

    name: str
    inputs: int
    outputs: int
    kernel: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, outputs first as in PyTorch."""
        return (self.outputs, self.inputs) + (self.kernel, self.kernel) * (self.kernel > 0)


LAYERS = (
    Layer("conv1", 1, 6, kernel=5),
    Layer("conv2", 6, 16, kernel=5),
    Layer("dense1", 16 * 4 * 4, 120),
    Layer("dense2", 120, 84),
    Layer("dense3", 84, 10),
)
HIDDEN = LAYERS[:-1]  # those followed by batch norm and the activation


class StepResult(NamedTuple):
    """Mean loss and number of right answers of one batch."""

    loss: float
    correct: int


class Score(NamedTuple):
    """Mean loss of a set of images `(B,)`, and for each image whether the answer is right."""

    loss: float
    right: NDArray[np.bool_]


class Probe(NamedTuple):
    """Values and gradients of one batch in training mode, keyed by layer.

    `before` and `after` hold the values before and after batch norm, both ahead of the activation, channels last;
    without batch norm they are the same arrays. `gradients` holds the Euclidean norm of the loss's gradient for each
    layer's weights. The running statistics are not updated.
    """

    before: dict[str, Floats]
    after: dict[str, Floats]
    gradients: dict[str, float]


class Network(Protocol):
    """A LeNet with its optimizer, in one framework; images are `(B, 28, 28)` float32, labels `(B,)` int32."""

    def step(self, images: Floats, labels: Labels) -> StepResult:
        """Train on one batch with Adam; the result is measured before the update."""
        ...

    def evaluate(self, images: Floats, labels: Labels, *, training: bool) -> Score:
        """The score by batch statistics (training) or running statistics (inference), without changing the network."""
        ...

    def probe(self, images: Floats, labels: Labels) -> Probe:
        """The values and gradients of one batch; the network is unchanged."""
        ...

    def gamma_beta(self) -> dict[str, tuple[Floats, Floats]]:
        """Gamma and beta of each batch norm, keyed by the layer before it; empty without batch norm."""
        ...

    def state(self) -> Arrays:
        """The complete training state: parameters, running statistics and the optimizer's moments, by name."""
        ...

    def restore(self, state: Arrays) -> None:
        """Restore a `state()` of the same kind of network.

        Raises:
            ValueError: an array is missing, unknown, or has another shape or type.
        """
        ...


def build(options: Options, *, batch_norm: bool) -> Network:
    """Build a network in the requested framework, which is imported only here; PyTorch is set to one thread."""
    if options.framework == "torch":
        import torch

        from batchnorm.training.network_torch import TorchNetwork

        # Batches this small gain nothing from a second thread, and beside a busy process OpenMP's waiting threads made
        # 44 steps take 14 s instead of 0.2 s (PyTorch 2.13, two cores). One thread also makes the numbers independent
        # of the number of cores, on machines of the same kind.
        torch.set_num_threads(1)
        return TorchNetwork(options, batch_norm=batch_norm)
    from batchnorm.training.network_jax import JaxNetwork

    return JaxNetwork(options, batch_norm=batch_norm)


def initial_weights(seed: int) -> dict[str, Floats]:
    """Every layer's initial weights, normal with variance 1 / fan-in (LeCun et al. 1998); biases start at zero.

    Drawn with NumPy, so that both networks of both frameworks start from the same numbers.

    Example:
        >>> initial_weights(0)["conv1"].shape
        (6, 1, 5, 5)
    """
    generator = np.random.default_rng(seed)
    weights = {}
    for layer in LAYERS:
        fan_in = int(np.prod(layer.shape[1:]))
        weights[layer.name] = generator.normal(0, fan_in**-0.5, layer.shape).astype(np.float32)
    return weights


def check_state(state: Arrays, expected: Arrays) -> None:
    """Raise unless a state has the names, shapes and dtypes of `expected`.

    Raises:
        ValueError: with the first difference.
    """
    if state.keys() != expected.keys():
        names = ", ".join(sorted(state.keys() ^ expected.keys())[:3])
        raise ValueError(f"it and this network differ in the arrays they have: {names}")
    for name, array in expected.items():
        found = state[name]
        if found.shape != array.shape or found.dtype != array.dtype:
            raise ValueError(f"{name} is {found.dtype}{found.shape}, this network's is {array.dtype}{array.shape}")
