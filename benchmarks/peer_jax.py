"""Batch norm in JAX under `jit`, with the formulas of Flax's layer: var = E[x^2] - E[x]^2, in float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from benchmarks.arrays import EPS, Arrays
from benchmarks.cases import Case
from benchmarks.contestants import JAX, Contestant, Results
from benchmarks.peer_numpy import canonical

Array = Any


def contestant(case: Case, arrays: Arrays) -> Contestant:
    """A function compiled for this case; a call waits for its results."""
    x = _array(case, arrays.x)
    arguments: tuple[Array, ...]
    gamma, beta, mean, var = (jnp.asarray(v.numpy()) for v in (arrays.gamma, arrays.beta, arrays.mean, arrays.var))
    if case.operation == "inference":
        function, arguments = jax.jit(partial(_normalize, case)), (x, gamma, beta, mean, var)
    else:
        kept = None if arrays.kept is None else jnp.asarray(arrays.kept.numpy())[..., None]
        residual = None if arrays.residual is None else _array(case, arrays.residual)
        forward = partial(_forward, case, kept)
        arguments = (x, gamma, beta) if residual is None else (x, gamma, beta, residual)
        function = jax.jit(forward)
        if arrays.dy is not None:
            function, arguments = jax.jit(partial(_with_gradients, forward)), (_array(case, arrays.dy), *arguments)

    def run() -> Any:
        return jax.block_until_ready(function(*arguments))

    return Contestant(JAX, run, partial(_unpack, case), warm_caches=partial(warm_caches, arguments))


def warm_caches(arguments: tuple[Array, ...]) -> None:
    """Read the arrays, which are copies, as `passes.warm_caches` reads the other contestants' tensors."""
    for array in reversed(arguments):
        np.asarray(array).view(np.uint8).sum(dtype=np.uint8)


def _forward(case: Case, kept: Array | None, x: Array, gamma: Array, beta: Array, *residual: Array) -> Array:
    axes, dtype = _reduced(case, x), x.dtype
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axes, where=kept)
    mean_of_squares = jnp.mean(wide * wide, axes, where=kept)
    y = _normalize(case, x, gamma, beta, mean, jnp.maximum(mean_of_squares - mean * mean, 0))
    if residual:
        y = y + residual[0]
    if case.operation in ("relu", "add+relu"):
        y = jax.nn.relu(y)
    return (y if kept is None else jnp.where(kept, y, 0)).astype(dtype)


def _normalize(case: Case, x: Array, gamma: Array, beta: Array, mean: Array, var: Array) -> Array:
    axes = _reduced(case, x)
    mean, beta, factor = (jnp.expand_dims(v, axes) for v in (mean, beta, jax.lax.rsqrt(var + EPS) * gamma))
    return ((x - mean) * factor + beta).astype(x.dtype)


def _with_gradients(forward: Any, dy: Array, *arguments: Array) -> tuple[Array, ...]:
    y, pull_back = jax.vjp(forward, *arguments)
    return y, *pull_back(dy)


def _reduced(case: Case, x: Array) -> tuple[int, ...]:
    axis = 1 if case.layout in ("NCHW", "NC") else x.ndim - 1
    return tuple(a for a in range(x.ndim) if a != axis)


def _array(case: Case, tensor: Tensor) -> Array:
    """The tensor as a JAX array, (N, H, W, C) if the channels are last, which JAX's transpose would not move."""
    values = tensor.permute(0, 2, 3, 1) if case.layout == "channels-last" else tensor
    return jnp.asarray(values.to(torch.float32).numpy(), dtype=case.dtype)


def _unpack(case: Case, results: Any) -> Results:
    values = results if isinstance(results, tuple) else (results,)
    names = ("y", "dx", "dgamma", "dbeta", "dresidual")
    return {name: canonical(case, np.asarray(value)) for name, value in zip(names, values, strict=False)}
