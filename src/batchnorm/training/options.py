"""The options of a run, checked once."""

import dataclasses
import math
import shlex
from dataclasses import dataclass

FRAMEWORKS = ("jax", "torch")
ACTIVATIONS = ("sigmoid", "relu", "leaky_relu", "silu", "tanh", "gelu", "identity")
DATASETS = ("digits", "fashion-mnist")


class InputError(ValueError):
    """Input from the user cannot be used; the message is one line with the value, the allowed values and the fix."""


@dataclass(frozen=True)
class Options:
    """The options of one experiment; two runs with equal options and equal images produce the same numbers.

    Batch size 32 and 30 epochs on the digits give both networks time to settle: the plain sigmoid network spends its
    first epochs at chance. The images are those of `dataset`, or, if `dataset` is None, of the folder `data`. `images`
    limits the number of training images; None keeps all.

    Raises:
        InputError: an option has a value that is not allowed.

    Example:
        >>> Options(seed=3).arguments()
        '--seed 3'
    """

    framework: str = "jax"
    activation: str = "sigmoid"
    epochs: int = 30
    learning_rate: float = 1e-3
    batch_size: int = 32
    seed: int = 0
    dataset: str | None = "digits"
    data: str | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        _require(self.framework in FRAMEWORKS, "framework", self.framework, f"one of {', '.join(FRAMEWORKS)}")
        _require(self.activation in ACTIVATIONS, "activation", self.activation, f"one of {', '.join(ACTIVATIONS)}")
        if self.dataset is not None and self.data is not None:
            raise InputError(f"--dataset {self.dataset} and --data {self.data} exclude each other; pass one of them")
        if self.data is None:
            allowed = f"one of {', '.join(DATASETS)}, or left out for --data DIR"
            _require(self.dataset in DATASETS, "dataset", self.dataset, allowed)
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "learning-rate",
            self.learning_rate,
            "a positive number",
        )
        _require(
            self.batch_size >= 2,
            "batch-size",
            self.batch_size,
            "at least 2: after a dense layer one image is its own mean, so batch norm would output beta for any image",
        )
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 4294967295")
        _require(
            self.images is None or self.images >= self.batch_size,
            "images",
            self.images,
            f"at least one batch, {self.batch_size}",
        )

    def arguments(self) -> str:
        """The command-line arguments for these options, without defaults."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = default_epochs(self.dataset, self.data) if field.name == "epochs" else field.default
            if value is not None and value != default:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def default_epochs(dataset: str | None, data: str | None) -> int:
    """The default number of epochs: 30 for the small set of digits, 10 for any larger one."""
    return 30 if dataset == "digits" and data is None else 10


def _require(holds: bool, option: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"--{option} is {value}; it must be {allowed}")
