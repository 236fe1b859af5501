"""What a kernel offers."""

from typing import Any, Protocol

from batchnorm.core.dtypes import Array
from batchnorm.core.masks import Mask
from batchnorm.core.moments import Moments
from batchnorm.core.running import RunningStatistics
from batchnorm.kernels.generic import Cache, Gradients
from batchnorm.spec import Operands, Spec

Refusal = Any  #: a `_native.Refusal`, which exists where the extension does


class Kernel(Protocol):
    """The implementation for the arrays of a library.

    A method returns a `Refusal`, with nothing changed, for a call that is wrong or that it does not serve: whatever is
    no tuple.
    """

    def normalize(
        self, spec: Spec, operands: Operands, running: RunningStatistics, training: bool, out: Array | None = None
    ) -> tuple[Array, RunningStatistics] | Refusal:
        """`functional.batch_norm`."""

    def forward(
        self, spec: Spec, operands: Operands, running: RunningStatistics | None = None, out: Array | None = None
    ) -> tuple[Array, Cache] | Refusal:
        """`functional.forward`."""

    def gradients(self, dy: Array, cache: Cache) -> Gradients | Refusal:
        """`functional.backward`."""

    def moments(self, spec: Spec, x: Array, mask: Mask) -> Moments | Refusal:
        """`functional.moments`."""

    def unsupported_reason(self, spec: Spec, operands: Operands, others: tuple[Array | None, ...]) -> str | None:
        """Why the kernel does not serve these operands and `others` beside them; None if it does."""
