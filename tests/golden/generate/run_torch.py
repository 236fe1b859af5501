"""Compute torch.npz: `torch.nn.BatchNorm1d`, `2d` and `3d` on the CPU.

    python -m pip install numpy==2.4.6 torch==2.13.0        # Python 3.11
    python run_torch.py FOLDER

Runs on one thread: torch sums the rows of channels-last tensors in one part for each thread, which changes the last
bits. Channels are on axis 1; the case `seq` is moved to (batch, channels, time) and its results back.
"""

import torch
from archive import CASES, DTYPES, Archive, Case, run

LAYERS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
#: (case, config, arguments of the layer); `channels_last` is the memory format of x.
CONFIGS = [
    *((case, "default", {}) for case in CASES),
    ("d4", "channels_last", {"channels_last": True}),
    *(
        (case, config, options)
        for case in ("d2", "d4")
        for config, options in {
            "mom0.3_eps1e-3": {"momentum": 0.3, "eps": 1e-3},
            "mom_none": {"momentum": None},
            "no_track": {"track_running_stats": False},
            "no_affine": {"affine": False},
        }.items()
    ),
    ("ill", "eps0", {"eps": 0.0}),
    ("const", "eps0", {"eps": 0.0}),
]
ONLY_FLOAT64 = ("mom_none", "no_track", "no_affine", "eps0")


class Layer:
    """A batch norm of torch with the parameters of a case."""

    def __init__(self, case, channels_last=False, **options):
        case.move_channels(1)
        self.case = case
        self.module = LAYERS[case.x.ndim](case.x.shape[1], dtype=torch.from_numpy(case.x).dtype, **options)
        if self.module.affine:
            self.module.load_state_dict(
                {"weight": torch.from_numpy(case.gamma), "bias": torch.from_numpy(case.beta)}, strict=False
            )
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.x_steps = [torch.from_numpy(x).contiguous(memory_format=memory_format) for x in case.x_steps]

    def call(self, x):
        """Output for x, in the layout of inputs.npz."""
        return self.case.restore(self.module(x).detach())

    def differentiate(self, suffix="", affine=True):
        """Output for the first batch and the gradients of sum(y * dy), as names with `suffix`."""
        x = self.x_steps[0].clone().requires_grad_()
        y = self.module(x)
        parameters = list(self.module.parameters()) if affine else []
        gradients = torch.autograd.grad(y, [x, *parameters], torch.from_numpy(self.case.dy))
        names = ("y", "dx", "dgamma", "dbeta")
        return {
            name + suffix: self.case.restore(value.detach())
            for name, value in zip(names, [y, *gradients], strict=False)
        }


def train(layer):
    """Three training steps from the initial state."""
    module, results = layer.module.train(), {}
    for step, x in enumerate(layer.x_steps, start=1):
        if step == 1:
            results |= layer.differentiate()
        else:
            module(x)
        if module.track_running_stats:
            results[f"running_mean_{step}"] = module.running_mean.clone()
            results[f"running_var_{step}"] = module.running_var.clone()
    if module.track_running_stats:
        results["num_batches_tracked_3"] = module.num_batches_tracked.clone()
    return results


def evaluate(layer):
    """Evaluation after the training steps, then with the stored statistics of inputs.npz."""
    module = layer.module.eval()
    results = layer.differentiate("_eval_3")
    if module.track_running_stats:
        module.running_mean.copy_(torch.from_numpy(layer.case.rmean0))
        module.running_var.copy_(torch.from_numpy(layer.case.rvar0))
        results |= layer.differentiate("_eval_r0", affine=False)
    return results


def make():
    """All configurations in both dtypes."""
    torch.set_num_threads(1)
    archive = Archive(f"torch.nn.BatchNorm1d/2d/3d, torch {torch.__version__} CPU")
    for dtype in DTYPES:
        for name, config, options in CONFIGS:
            if dtype == "f32" and config in ONLY_FLOAT64:
                continue
            archive.add_config(name, config, options)
            layer = Layer(Case(name, dtype), **options)
            layer.module.eval()
            archive.add(dtype, name, config, {"y_eval_init": layer.call(layer.x_steps[0])})
            with archive.record_error(f"{dtype}/{name}/{config}/train"):
                archive.add(dtype, name, config, train(layer))
            archive.add(dtype, name, config, evaluate(layer))
    return archive


if __name__ == "__main__":
    run("torch", make)
