"""Compute paddle.npz: `paddle.nn.BatchNorm1D`, `2D` and `3D` on the CPU.

    python -m pip install numpy==2.4.6 paddlepaddle==3.3.1        # Python 3.11
    python run_paddle.py FOLDER

Channels are on axis 1; the case `seq` is moved to (batch, channels, time) and its results back.
"""

import paddle
from archive import CASES, DTYPES, Archive, Case, run

LAYERS = {2: paddle.nn.BatchNorm1D, 3: paddle.nn.BatchNorm1D, 4: paddle.nn.BatchNorm2D, 5: paddle.nn.BatchNorm3D}
#: (case, config, arguments of the layer).
CONFIGS = [
    *((case, "default", {}) for case in CASES),
    ("d4", "mom0.7_eps1e-3", {"momentum": 0.7, "epsilon": 1e-3}),
    ("d4", "global_stats", {"use_global_stats": True}),
    ("d4", "no_global_stats", {"use_global_stats": False}),
    ("d4", "no_affine", {"weight_attr": False, "bias_attr": False}),
    ("ill", "eps0", {"epsilon": 0.0}),
]


def differentiate(layer, case, suffix=""):
    """Output for the first batch and the gradients of sum(y * dy), as names with `suffix`."""
    x = paddle.to_tensor(case.x, stop_gradient=False)
    y = layer(x)
    parameters = [] if layer.weight is None else [layer.weight, layer.bias]
    gradients = paddle.grad([y], [x, *parameters], grad_outputs=[paddle.to_tensor(case.dy)])
    names = ("y", "dx", "dgamma", "dbeta")
    return {name + suffix: case.restore(value.numpy()) for name, value in zip(names, [y, *gradients], strict=False)}


def compute(case, **options):
    """Three training steps, gradients of the first, and evaluation before and after them."""
    case.move_channels(1)
    layer = LAYERS[case.x.ndim](case.x.shape[1], **options)
    if layer.weight is not None:
        layer.weight.set_value(paddle.to_tensor(case.gamma))
        layer.bias.set_value(paddle.to_tensor(case.beta))
    layer.eval()
    results = {"y_eval_init": case.restore(layer(paddle.to_tensor(case.x)).numpy())}
    layer.train()
    for step, x in enumerate(case.x_steps, start=1):
        if step == 1:
            results |= differentiate(layer, case)
        else:
            layer(paddle.to_tensor(x))
        results |= {f"running_mean_{step}": layer._mean.numpy(), f"running_var_{step}": layer._variance.numpy()}
    layer.eval()
    return results | differentiate(layer, case, "_eval_3")


def make():
    """All configurations in float64, those with the default arguments in float32 too."""
    paddle.set_device("cpu")
    archive = Archive(f"paddle.nn.BatchNorm1D/2D/3D paddle {paddle.__version__} CPU")
    for dtype in DTYPES:
        paddle.set_default_dtype("float64" if dtype == "f64" else "float32")
        for name, config, options in CONFIGS:
            if dtype == "f64" or config == "default":
                archive.add_config(name, config, options)
                archive.add(dtype, name, config, compute(Case(name, dtype), **options))
    return archive


if __name__ == "__main__":
    run("paddle", make)
