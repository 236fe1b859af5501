"""Private names of PyTorch, each with its use. They are valid for PyTorch 2.6 to 2.13.

No other module of this package imports a private name of PyTorch, except for `torch.fx` and `torch._dynamo`, which are
imported where they are needed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch._C import DisableTorchFunctionSubclass as DisableTorchFunctionSubclass
from torch._C import DispatchKey
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _autograd as autograd
from torch._C import _current_graph_task_id as current_backward
from torch._C import _dispatch_tls_local_exclude_set as excluded_keys
from torch._C import _dispatch_tls_local_include_set as included_keys
from torch._C import _ForceDispatchKeyGuard as force_keys
from torch._C import _functorch as functorch
from torch._C import _increment_version as increment_version
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._jit_internal import is_scripting
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "DisableTorchFunctionSubclass",
    "are_transforms_active",
    "autograd",
    "autograd_in_operators",
    "constant_in_graphs",
    "disable_current_modes",
    "dispatch_modes",
    "functorch",
    "increment_version",
    "is_batched",
    "is_compiling",
    "is_exporting",
    "is_forward_mode",
    "is_in_graph",
    "is_recomputed",
    "is_scripting",
    "is_traceable_wrapper_subclass",
    "is_traced",
    "is_tracing",
    "is_transformed",
    "temporarily_clear_interpreter_stack",
]

F = TypeVar("F", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Whether calls are traced for torch.export.

    Reads the flag, because Dynamo in PyTorch 2.11 replaces `torch.compiler.is_exporting()` by True in everything that
    it compiles. PyTorch before 2.7 has no flag: there, exporting cannot be told from compiling.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_in_graph() -> bool:
    """Whether calls are traced into a graph: torch.compile, torch.export, torch.jit.trace."""
    return is_compiling() or is_tracing()


def is_transformed() -> bool:
    """Whether calls are transformed, or intercepted by a dispatch mode: torch.func, fx, fake tensors."""
    return are_transforms_active() or dispatch_modes() > 0


def is_traced() -> bool:
    """Whether calls are traced or transformed rather than run."""
    return is_in_graph() or is_transformed()


def is_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, so that any tensor may carry a tangent."""
    return forward_ad._current_level >= 0


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is batched by `vmap`, or by the older one of `torch.autograd.grad(is_grads_batched=True)`."""
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def is_recomputed() -> bool:
    """Whether a forward pass is being recomputed during a backward pass, as gradient checkpointing does."""
    return current_backward() != -1


def autograd_in_operators() -> AbstractContextManager[None]:
    """Context manager that makes autograd record in an operator's implementation, where PyTorch disables it."""
    keys = excluded_keys().remove(DispatchKey.AutogradFunctionality)
    return force_keys(included_keys(), keys)


def constant_in_graphs(function: F) -> F:
    """Make Dynamo call a function while it traces and treat the result as a constant.

    Equivalent to `torch.compiler.assume_constant_result`, without importing Dynamo, which takes as long as importing
    all of PyTorch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
