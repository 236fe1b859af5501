"""Compute returnn_rf.npz: `rf.BatchNorm` of RETURNN with the torch backend.

    python -m pip install numpy==2.4.6 torch==2.13.0 dm-tree==0.1.10        # Python 3.11
    python -m pip install returnn==1.20261022.211313
    python run_returnn_rf.py FOLDER

Behavior version 16, on one thread. In the case `seq` time is a dynamic dimension with the lengths of inputs.npz, or of
the configuration; dy is 0 on padding, except in the results `*_fulldy`. `pad` is written to the padding of x.
"""

import numpy as np
import returnn
import returnn.frontend as rf
import torch
from archive import CASES, DTYPES, Archive, Case, run
from returnn.tensor import Dim, Tensor
from returnn.util.basic import BehaviorVersion

BEHAVIOR_VERSION = 16
OTHER = {"momentum": 0.3, "eps": 1e-5}
#: Of the case `seq`: config -> arguments of the layer; `lengths`, `frames`, `pad` and `with_full_dy` of `compute`.
MASKED = {
    "mask": {"use_mask": True},
    "mask_default_arg": {},
    "nomask": {"use_mask": False},
    "mask_mom0.3_eps1e-5": {"use_mask": True, **OTHER},
    "nomask_mom0.3_eps1e-5": {"use_mask": False, **OTHER},
    "mask_noaffine": {"use_mask": True, "affine": False},
    "mask_notrack": {"use_mask": True, "track_running_stats": False, "with_full_dy": False},
    "nomask_notrack": {"use_mask": False, "track_running_stats": False, "with_full_dy": False},
    "mask_pad1e6": {"use_mask": True, "pad": 1e6, "with_full_dy": False},
    "mask_padnan": {"use_mask": True, "pad": float("nan"), "with_full_dy": False},
    "mask_alllen0": {"use_mask": True, "lengths": [0, 0, 0, 0, 0], "frames": 0},
    "mask_onevalid": {"use_mask": True, "lengths": [1, 0, 0, 0, 0], "frames": 1},
    "mask_fulllen": {"use_mask": True, "lengths": [7, 7, 7, 7, 7]},
}
#: (case, config, the same); without dynamic dimensions.
STATIC = [
    *((case, "default", {}) for case in CASES if case != "seq"),
    *(
        (case, config, options)
        for case in ("d2", "d4")
        for config, options in {
            "mom0.3_eps1e-5": OTHER,
            "noaffine": {"affine": False},
            "notrack": {"track_running_stats": False},
        }.items()
    ),
]
FLOAT32 = ("default", "mask", "nomask", "mask_pad1e6", "mask_padnan")


class Layer:
    """A batch norm of RETURNN with the parameters of a case, and the dimensions of x."""

    def __init__(self, case, **options):
        self.case, shape = case, case.x.shape
        self.dims = [Dim(size, name=f"axis{axis}") for axis, size in enumerate(shape)]
        if case.lengths is not None:
            lengths = torch.tensor(np.asarray(case.lengths), dtype=torch.int32)
            self.dims[1] = Dim(Tensor("lengths", self.dims[:1], dtype="int32", raw_tensor=lengths), name="time")
        self.feature_dim = self.dims[case.channel_axis]
        with rf.set_default_float_dtype_ctx(case.dtype.__name__):
            self.module = rf.BatchNorm(self.feature_dim, **options)
        self.parameters = [self.module.gamma, self.module.beta] if self.module.affine else []
        for parameter, value in zip(self.parameters, (case.gamma, case.beta), strict=False):
            parameter.raw_tensor.data = torch.tensor(value)

    @property
    def state(self):
        """Running mean and variance, if the layer has them."""
        statistics = self.module.running_mean, self.module.running_variance
        return {name: p.raw_tensor for name, p in zip(("mean", "var"), statistics, strict=True) if p is not None}

    def call(self, x, is_training):
        """Output for a torch tensor; trains if `is_training`."""
        rf.init_train_step_run_ctx(train_flag=is_training)
        source = Tensor("x", self.dims, dtype=self.case.dtype.__name__, feature_dim=self.feature_dim, raw_tensor=x)
        return self.module(source).copy_transpose(self.dims).raw_tensor

    def differentiate(self, dy, suffix="", is_training=True, affine=True):
        """Output for the first batch and the gradients of sum(y * dy), as names with `suffix`."""
        x = torch.tensor(self.case.x, requires_grad=True)
        y = self.call(x, is_training)
        inputs = [x, *(p.raw_tensor for p in self.parameters if affine)]
        gradients = torch.autograd.grad(y, inputs, torch.tensor(dy))
        names = ("y", "dx", "dgamma", "dbeta")
        return {n + suffix: v.detach().numpy().copy() for n, v in zip(names, [y, *gradients], strict=False)}


def prepare(case, lengths=None, frames=None, pad=None):
    """Cut the case `seq` to `frames`, with other lengths; returns dy before that on padding is set to 0."""
    if case.lengths is None:
        return case.dy
    if lengths is not None:
        case.lengths = np.array(lengths)
    if frames is not None:
        case.x_steps, case.dy = case.x_steps[:, :, :frames], case.dy[:, :frames]
    case.mask = np.arange(case.x.shape[1]) < case.lengths[:, None]
    full_dy = case.dy.copy()
    case.pad(pad)
    return full_dy


def train(layer):
    """Three training steps, and gradients of the first."""
    results = {}
    for step, x in enumerate(layer.case.x_steps, start=1):
        if step == 1:
            results |= layer.differentiate(layer.case.dy)
        else:
            layer.call(torch.tensor(x), is_training=True)
        results |= {f"running_{name}_{step}": value.detach().numpy().copy() for name, value in layer.state.items()}
    return results


def compute(case, lengths=None, frames=None, pad=None, with_full_dy=True, **options):
    """Training and evaluation before and after it, and with the statistics of inputs.npz: yields in turn."""
    full_dy = prepare(case, lengths, frames, pad)
    layer = Layer(case, **options)
    yield {"y_eval_init": layer.call(torch.tensor(case.x), is_training=False).detach().numpy()}
    if case.lengths is not None and with_full_dy:
        yield Layer(case, **options).differentiate(full_dy, "_fulldy")
    yield train(layer)
    results = layer.differentiate(case.dy, "_eval_3", is_training=False)
    for name, value in layer.state.items():
        value.data = torch.tensor(getattr(case, f"r{name}0"))
    if layer.state:
        results |= layer.differentiate(case.dy, "_eval_r0", is_training=False, affine=False)
    yield results


def make():
    """All configurations in float64, some in float32 too."""
    BehaviorVersion.set(BEHAVIOR_VERSION)
    rf.select_backend_torch()
    torch.set_num_threads(1)
    versions = f"RETURNN {returnn.__version__} rf.BatchNorm, torch backend (torch {torch.__version__})"
    archive = Archive(f"{versions}, behavior_version {BEHAVIOR_VERSION}")
    for dtype in DTYPES:
        for name, config, options in [*(("seq", *item) for item in MASKED.items()), *STATIC]:
            if dtype == "f32" and config not in FLOAT32:
                continue
            archive.add_config(name, config, options)
            with archive.record_error(f"{dtype}/{name}/{config}/run"):
                for results in compute(Case(name, dtype), **options):
                    archive.add(dtype, name, config, results)
    return archive


if __name__ == "__main__":
    run("returnn_rf", make)
