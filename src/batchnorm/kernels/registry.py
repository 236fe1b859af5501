"""The kernels by name."""

from types import ModuleType

from batchnorm.kernels import agnostic

#: Each offers batch_norm, forward, backward and moments, with the signatures of `agnostic`.
KERNELS: dict[str, ModuleType] = {"agnostic": agnostic}


def select(name: str | None) -> ModuleType:
    """The kernel called `name`, or the best one for None.

    Raises:
        ValueError: No kernel has that name.
    """
    if name is None:
        return agnostic
    if name not in KERNELS:
        raise ValueError(f"no kernel is called {name!r}; known are {', '.join(KERNELS)}, or None for the best one")
    return KERNELS[name]
