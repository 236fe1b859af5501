"""Measurements of the two networks during training, as plain records that JSON can represent.

A number that is not finite is stored as None, which JSON and the charts support.
"""

import math
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from batchnorm.training.data import Floats, ImageSet, Labels
from batchnorm.training.network import HIDDEN, LAYERS, Network

PLAIN, BATCH_NORM = "plain", "batch_norm"
NETWORKS = (PLAIN, BATCH_NORM)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PROBE_IMAGES = 256
EVALUATION_BATCH = 500  # bounds the memory of inference; the first convolution holds 14 kB per image


class Epoch(TypedDict):
    """One epoch of one network; `seconds` covers training steps only.

    `test_accuracy` is measured in inference mode, `test_accuracy_batch` in training mode on batches of the training's
    size, which only differs with batch norm. `test_only` counts the test images that this network got right in
    inference mode and the other did not, which a comparison of two networks on the same images requires.
    """

    epoch: int
    train_loss: float | None
    train_accuracy: float
    test_loss: float | None
    test_accuracy: float
    test_only: int
    test_accuracy_batch: float | None
    seconds: float


class Distribution(TypedDict):
    """The distribution of the values at one place: their `QUANTILES`, and their variation from image to image.

    `variation` is the root mean square over channels of the standard deviation over images and positions. A channel
    with the same values for every image has variation 0, however large the values are.
    """

    quantiles: list[float | None]
    variation: float | None


class LayerProbe(TypedDict):
    """The distributions before and after one batch norm; without batch norm both are the layer's output."""

    before: Distribution
    after: Distribution


class ProbeRecord(TypedDict):
    """All layers after `epoch` epochs (0: before training), always for the same images."""

    epoch: int
    layers: dict[str, LayerProbe]
    gradients: dict[str, float | None]


class GammaBeta(TypedDict):
    """One batch norm's parameters after the last epoch."""

    gamma: list[float | None]
    beta: list[float | None]


class History(TypedDict):
    """All measurements of one network so far."""

    epochs: list[Epoch]
    probes: list[ProbeRecord]
    gamma_beta: dict[str, GammaBeta]


def number(value: float) -> float | None:
    """The value, or None if it is not finite, which JSON cannot represent.

    Example:
        >>> number(0.5), number(float("nan"))
        (0.5, None)
    """
    return float(value) if math.isfinite(value) else None


def is_probed(epoch: int) -> bool:
    """Whether an epoch's layers are recorded: all up to 32, then 16 for each doubling.

    The rule does not depend on the planned number of epochs, so a continued run records the same epochs as an
    uninterrupted one.

    Example:
        >>> [epoch for epoch in range(65) if not is_probed(epoch)][:3]
        [33, 35, 37]
    """
    stride = max(1, 2 ** ((epoch - 1).bit_length() - 5)) if epoch else 1
    return epoch % stride == 0


def evaluate(
    network: Network, images: Floats, labels: Labels, *, training: bool, batch_size: int
) -> tuple[float, NDArray[np.bool_]]:
    """Mean loss, and for each image whether the answer is right, over nearly equal batches of `batch_size` or more.

    A batch is smaller only if there are fewer images: in training mode, a few left-over ones would be normalized by
    their own statistics.
    """
    loss = 0.0
    right = np.zeros(len(labels), bool)
    for part in np.array_split(np.arange(len(labels)), max(1, len(labels) // batch_size)):
        score = network.evaluate(images[part], labels[part], training=training)
        loss += score.loss * len(part) / len(labels)
        right[part] = score.right
    return loss, right


def probe(network: Network, data: ImageSet, epoch: int) -> ProbeRecord:
    """The distributions and gradients of the first training images, the same images at every call."""
    measured = network.probe(data.train_images[:PROBE_IMAGES], data.train_labels[:PROBE_IMAGES])
    return ProbeRecord(
        epoch=epoch,
        layers={
            layer.name: LayerProbe(
                before=_distribution(measured.before[layer.name]), after=_distribution(measured.after[layer.name])
            )
            for layer in HIDDEN
        },
        gradients={layer.name: number(measured.gradients[layer.name]) for layer in LAYERS},
    )


def gamma_beta(network: Network) -> dict[str, GammaBeta]:
    """The parameters of every batch norm as lists."""
    return {
        name: GammaBeta(gamma=[number(g) for g in gamma], beta=[number(b) for b in beta])
        for name, (gamma, beta) in network.gamma_beta().items()
    }


def _distribution(values: NDArray[np.float32]) -> Distribution:
    wide = values.astype(np.float64).reshape(-1, values.shape[-1])
    with np.errstate(all="ignore"):  # a diverged network's values overflow, and are recorded as None
        quantiles = np.quantile(wide, QUANTILES)
        variation = np.sqrt(wide.var(axis=0).mean())
    return Distribution(quantiles=[number(q) for q in quantiles], variation=number(variation))
