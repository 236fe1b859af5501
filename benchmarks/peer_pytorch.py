"""PyTorch's own batch norm: eager, compiled, and oneDNN's primitive behind it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.arrays import EPS, Arrays
from benchmarks.cases import Case
from benchmarks.contestants import COMPILED, EAGER, IN_PLACE, ONEDNN, Contestant, Results
from benchmarks.passes import warm_caches

Function = Callable[..., Tensor]


def contestant(peer: str, case: Case, arrays: Arrays) -> Contestant:
    """One of PyTorch's implementations of a case."""
    if peer == ONEDNN:
        return Contestant(ONEDNN, _onednn(case, arrays), _dense, warm_caches=partial(warm_caches, arrays))
    if case.operation == "forward-out":
        return Contestant(EAGER, _into(arrays), _unpack, warm_caches=partial(warm_caches, arrays))
    function = function_of(case, arrays, peer)
    if peer == COMPILED:
        torch.compiler.reset()  # drops earlier cases: it would give up after eight shapes of one function
        function = torch.compile(function, dynamic=False)
    return Contestant(peer, _with_autograd(function, arrays), _unpack, warm_caches=partial(warm_caches, arrays))


def function_of(case: Case, arrays: Arrays, peer: str) -> Function:
    """The function that computes y from (x, gamma, beta) and, if there is one, the residual."""
    if case.operation == "inference":
        return lambda x, gamma, beta: functional.batch_norm(
            x, arrays.mean, arrays.var, gamma, beta, training=False, eps=EPS
        )
    if arrays.kept is not None:
        return _masked_formula(arrays.kept) if peer == COMPILED else _masked_rows(arrays.kept)
    if case.operation == "relu":
        relu = functional.relu_ if peer == IN_PLACE else functional.relu
        return lambda x, gamma, beta: relu(batch_norm(x, gamma, beta))
    if case.operation == "add+relu":
        if peer == IN_PLACE:
            return lambda x, gamma, beta, residual: functional.relu_(batch_norm(x, gamma, beta).add_(residual))
        return lambda x, gamma, beta, residual: functional.relu(batch_norm(x, gamma, beta) + residual)
    return batch_norm


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The training forward pass without running statistics, which our call does not update either."""
    return functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)


def _masked_rows(kept: Tensor) -> Function:
    """The usual workaround for a missing mask: batch norm of the valid rows, scattered into zeros."""

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[kept] = batch_norm(x[kept], gamma, beta)
        return y

    return function


def _masked_formula(kept: Tensor) -> Function:
    """Masked batch norm without shapes that depend on the mask, which the compiler could not fuse."""

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        mask = kept.unsqueeze(-1)
        count = mask.sum()
        wide = x.float()
        mean = torch.where(mask, wide, 0).sum((0, 1)) / count
        deviation = torch.where(mask, wide - mean, 0)
        var = (deviation * deviation).sum((0, 1)) / count
        y = deviation * (torch.rsqrt(var + EPS) * gamma) + beta
        return torch.where(mask, y, 0).to(x.dtype)

    return function


def _with_autograd(function: Function, arrays: Arrays) -> Callable[[], Any]:
    arguments = [arrays.x, arrays.gamma, arrays.beta]
    if arrays.residual is not None:
        arguments.append(arrays.residual)
    if arrays.dy is None:

        def forward() -> Any:
            with torch.no_grad():
                return (function(*arguments),)

        return forward
    leaves = [argument.detach().requires_grad_() for argument in arguments]

    def forward_backward() -> Any:
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, arrays.dy)

    return forward_backward


def _into(arrays: Arrays) -> Callable[[], Any]:
    x, gamma, beta = arrays.x, arrays.gamma, arrays.beta
    assert arrays.out is not None
    results = (arrays.out, torch.empty_like(gamma), torch.empty_like(gamma))

    def run() -> Any:
        with torch.no_grad():
            return torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS, out=results)[:1]

    return run


def _onednn(case: Case, arrays: Arrays) -> Callable[[], Any]:
    x = arrays.x.to_mkldnn()
    training = case.operation != "inference"
    mean, var = (None, None) if training else (arrays.mean, arrays.var)

    def run() -> Any:
        with torch.no_grad():
            return (functional.batch_norm(x, mean, var, arrays.gamma, arrays.beta, training=training, eps=EPS),)

    return run


def _dense(results: tuple[Tensor]) -> Results:
    return _unpack((results[0].to_dense(),))


def _unpack(results: tuple[Tensor, ...]) -> Results:
    names = ("y", "dx", "dgamma", "dbeta", "dresidual")
    return {name: value.detach().to(torch.float64).numpy() for name, value in zip(names, results, strict=False)}
