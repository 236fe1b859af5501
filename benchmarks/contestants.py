"""The contestants of a race, and the form in which their results are compared."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import Case

if TYPE_CHECKING:
    from benchmarks.arrays import Arrays

OURS, OURS_NUMPY, FLOOR = "batchnorm", "batchnorm (NumPy)", "floor"
EAGER, IN_PLACE, COMPILED = "PyTorch", "PyTorch in place", "torch.compile"
ONEDNN, OPENVINO, JAX, NUMPY = "oneDNN", "OpenVINO", "JAX", "NumPy"
PEERS = {
    EAGER: "eager, with autograd",
    IN_PLACE: "eager, with += and an in-place ReLU as torchvision's networks have them",
    COMPILED: "the same functions compiled by Inductor",
    ONEDNN: "the primitive, through PyTorch's mkldnn tensors",
    OPENVINO: "a model of this operation, compiled for the case; inference only",
    JAX: "under jit, with the formulas of Flax",
    NUMPY: "as people write it; compared with ours on NumPy arrays",
}
# The optional packages of peers. PyTorch is always required, because ours runs on it.
MODULES = {OPENVINO: "openvino", JAX: "jax"}

AGAINST = {NUMPY: OURS_NUMPY, OURS_NUMPY: OURS_NUMPY}  # the reference of a contestant's ratio, if it is not OURS

Results = dict[str, NDArray[np.float64]]


def nothing() -> None:
    """Do nothing; the default `warm_caches` of a contestant."""


@dataclass(frozen=True)
class Contestant:
    """One implementation of a case.

    Attributes:
        name: Its name in tables and files.
        run: Computes and returns all results, so that none of them is freed inside the timed call.
        unpack: Converts the results of `run` for comparison: arrays by name (`y`, `dx`, `dgamma`, `dbeta`, `dresidual`)
            with the axes of `Case.shape`.
        warm_caches: Loads the inputs into the cache, and wakes the threads; not timed.
    """

    name: str
    run: Callable[[], Any]
    unpack: Callable[[Any], Results] | None = None
    warm_caches: Callable[[], object] = nothing


def participants(case: Case, *, compiles: bool = True) -> tuple[str, ...]:
    """The peers that take part in a case: those that support it and give a meaningful comparison.

    oneDNN is reachable for float32 and NCHW; its backward pass includes PyTorch's conversions, which would be timed
    too. OpenVINO has inference alone, and is compared in the same type and layout. NumPy has no bfloat16, and takes
    seconds for the huge tensor. NumPy code with a fused activation is not in common use.
    """
    peers = [EAGER]
    if case.operation == "forward-out":
        return tuple(peers)
    if case.operation in ("relu", "add+relu"):
        peers.append(IN_PLACE)
    if compiles:
        peers.append(COMPILED)
    if case.dtype == "float32" and case.layout == "NCHW" and case.operation in ("forward", "inference"):
        peers.append(ONEDNN)
        if case.operation == "inference":
            peers.append(OPENVINO)
    peers.append(JAX)
    is_plain = case.operation in ("forward", "forward+backward", "inference")
    if case.dtype == "float32" and is_plain and case.layout != "masked" and case.family != "huge":
        peers.append(NUMPY)
    return tuple(peers)


def missing(peers: Iterable[str]) -> dict[str, str]:
    """The peers that cannot take part here, each with the missing package."""
    return {peer: MODULES[peer] for peer in peers if peer in MODULES and find_spec(MODULES[peer]) is None}


def contestants(case: Case, arrays: "Arrays", peers: Iterable[str]) -> list[Contestant]:
    """Ours, the memory passes that make up the floor, and these peers; their libraries are imported only here."""
    from benchmarks import ours, passes, peer_numpy, peer_pytorch

    found = [ours.with_tensors(case, arrays), *passes.contestants(case, arrays)]
    for peer in peers:
        if peer == JAX:
            from benchmarks import peer_jax

            found.append(peer_jax.contestant(case, arrays))
        elif peer == OPENVINO:
            from benchmarks import peer_openvino

            found.append(peer_openvino.contestant(case, arrays))
        elif peer == NUMPY:
            found += [peer_numpy.contestant(case, arrays), ours.with_numpy(case, arrays)]
        else:
            found.append(peer_pytorch.contestant(peer, case, arrays))
    return found
