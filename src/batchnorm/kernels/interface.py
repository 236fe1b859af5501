"""The interface of a kernel."""

from typing import Any, Protocol

from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Mask
from batchnorm.core.moments import Moments
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels.generic import Cache, Gradients
from batchnorm.spec import Operands, Spec

Refusal = Any  #: a `_native.Refusal`, defined only if the extension is present


class Kernel(Protocol):
    """The implementation for the arrays of a library.

    A method returns a `Refusal`, with nothing changed, for an invalid or unsupported call: anything but a tuple.
    """

    def normalize(
        self, spec: Spec, operands: Operands, running: RunningStatistics, training: bool, out: Array | None = None
    ) -> tuple[Array, RunningStatistics] | Refusal:
        """Implement `functional.batch_norm`."""

    def forward(
        self, spec: Spec, operands: Operands, running: RunningStatistics | None = None, out: Array | None = None
    ) -> tuple[Array, Cache] | Refusal:
        """Implement `functional.forward`."""

    def gradients(self, dy: Array, cache: Cache) -> Gradients | Refusal:
        """Implement `functional.backward`."""

    def moments(self, spec: Spec, x: Array, mask: Mask) -> Moments | Refusal:
        """Implement `functional.moments`."""

    def unsupported_reason(self, spec: Spec, operands: Operands, others: tuple[Array | None, ...]) -> str | None:
        """Why the kernel does not support these operands and the further arrays `others`; None if it does."""
