"""The array libraries under test, behind one small interface."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from layouts import tensor


class Library:
    """NumPy; the others override what differs."""

    name = "numpy"
    differentiates = False

    def array(self, values: Any, dtype: str | None = None) -> Any:
        return np.array(values, dtype=dtype)  # a copy: nothing under test may change the caller's

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def context(self, dtype: str) -> Any:
        """The context that float64 arrays require."""
        return nullcontext()

    def gradients(self, loss: Callable[..., Any], *arguments: Any) -> list[np.ndarray]:
        """Gradients of a scalar loss with respect to every argument."""
        raise NotImplementedError


class Strict(Library):
    """array-api-strict: nothing beyond the standard works."""

    name = "strict"

    def array(self, values, dtype=None):
        return array_api_strict.asarray(np.array(values, dtype=dtype))

    def numpy(self, array):
        return np.asarray(array._array)


class ReadOnly(Library):
    """NumPy arrays that must not be written to."""

    name = "readonly"

    def array(self, values, dtype=None):
        array = np.array(values, dtype=dtype)
        array.flags.writeable = False
        return array


class Torch(Library):
    name = "torch"
    differentiates = True

    def array(self, values, dtype=None):
        return torch.from_numpy(np.array(values, dtype=dtype))

    def numpy(self, array):
        return array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)

    def gradients(self, loss, *arguments):
        leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
        gradients = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
        return [
            np.zeros(leaf.shape) if gradient is None else gradient.numpy()
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]


class Jax(Library):
    name = "jax"
    differentiates = True

    def array(self, values, dtype=None):
        return jnp.array(values, dtype=dtype)

    def context(self, dtype):
        return jax.enable_x64(dtype == "float64")

    def gradients(self, loss, *arguments):
        gradients = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))
        return [np.asarray(gradient) for gradient in gradients(*arguments)]


LIBRARIES = {library.name: library for library in (Library(), ReadOnly(), Strict(), Torch(), Jax())}

#: The libraries that the kernels support.
NATIVE_LIBRARIES = {"numpy": np.asarray, "torch": tensor}


def by_name(library: Library) -> str:
    return library.name


every_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=by_name)
every_native_library = pytest.mark.parametrize("library", NATIVE_LIBRARIES.values(), ids=NATIVE_LIBRARIES)
