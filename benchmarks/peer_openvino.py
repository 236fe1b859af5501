"""OpenVINO's batch norm of inference, in a model of this single operation that is compiled for the case.

OpenVINO has no batch norm that computes statistics, and no gradients.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.arrays import EPS, Arrays
from benchmarks.cases import Case
from benchmarks.contestants import OPENVINO, Contestant, Results
from benchmarks.passes import warm_caches


def contestant(case: Case, arrays: Arrays) -> Contestant:
    """A model compiled for this case; a call allocates its result as PyTorch does, and OpenVINO writes into it.

    The first call compiles, so that a failure excludes the peer from the race instead of ending the run.
    """
    compiled = cache(partial(_compile, case, arrays))
    return Contestant(OPENVINO, lambda: compiled()(), _unpack, warm_caches=partial(warm_caches, arrays))


def _compile(case: Case, arrays: Arrays) -> Callable[[], Tensor]:
    import openvino  # type: ignore[import, unused-ignore]  # optional
    from openvino import opset13 as operations  # type: ignore[import, unused-ignore]

    parameter = operations.parameter(case.shape, openvino.Type.f32)
    constants = (value.numpy() for value in (arrays.gamma, arrays.beta, arrays.mean, arrays.var))
    model = openvino.Model([operations.batch_norm_inference(parameter, *constants, EPS)], [parameter])
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the processor has instructions for it
        "ENABLE_CPU_PINNING": False,  # pinned threads would stay so in the turns of the other contestants
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(arrays.x.numpy(), shared_memory=True))

    def run() -> Tensor:
        y = torch.empty_like(arrays.x)
        request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))
        request.infer(share_outputs=True)  # otherwise each call copies the results
        return y

    return run


def _unpack(y: Tensor) -> Results:
    return {"y": y.to(torch.float64).numpy()}
