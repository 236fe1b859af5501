"""Access to PyTorch's internals: private names, with the versions they were checked in, and its install folder."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

#: Where the code of PyTorch and of this library lies.
LIBRARIES = tuple(
    os.path.join(folder, "") for folder in (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
)

F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """Let Dynamo call a function while it traces, and take the result for a constant.

    What `torch.compiler.assume_constant_result` does (PyTorch 2.6 to 2.13) without importing Dynamo, which takes as
    long as importing all of PyTorch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def user_stacklevel() -> int:
    """The `stacklevel` with which a warning points at the innermost line that is neither PyTorch's nor ours."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level
