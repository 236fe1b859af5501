"""Compute tensorflow.npz: TensorFlow's fused batch norm, and `tf.nn.moments` with `tf.nn.batch_normalization`.

    python -m pip install numpy==2.4.6 tensorflow-cpu==2.21.0        # Python 3.11
    python run_tensorflow.py FOLDER

Eager, on the CPU, on one thread: with several the sums have other last bits. Channels are on the last axis, except in
the config `fused_nchw`. The fused operation takes four axes, so the others of cases without four are flattened into
one; it refuses float64.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf
from archive import CASES, DTYPES, Archive, Case, run

FUSED = {"epsilon": 1e-3, "exponential_avg_factor": 0.1, "data_format": "NHWC"}
PLAIN = {"variance_epsilon": 1e-3}
#: (case, config, arguments of the fused operation besides those above).
FUSED_CONFIGS = [
    *((case, "fused_default", {}) for case in CASES),
    ("d4", "fused_nchw", {"data_format": "NCHW"}),
    *(
        (case, "fused_eps1e-5_mom0.3", {"epsilon": 1e-5, "exponential_avg_factor": 0.3})
        for case in ("d2", "d4", "ill", "const")
    ),
    *((case, "fused_eps0", {"epsilon": 0.0}) for case in ("d2", "d4", "ill", "const")),
    ("d4", "fused_factor1", {"exponential_avg_factor": 1.0}),
]


def differentiate(call, case, suffix=""):
    """Output of `call(x, gamma, beta)` for the first batch, its gradients, and what `call` returns besides."""
    inputs = [tf.constant(value) for value in (case.x, case.gamma, case.beta)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y, *rest = call(*inputs)
    gradients = tape.gradient(y, inputs, output_gradients=tf.constant(case.dy))
    names = ("y", "dx", "dgamma", "dbeta")
    return {name + suffix: case.restore(v) for name, v in zip(names, [y, *gradients], strict=True)}, *rest


class Fused:
    """The fused operation for one case, with its arguments."""

    def __init__(self, case, options):
        case.move_channels(1 if options["data_format"] == "NCHW" else -1)
        shape = case.x.shape
        self.case, self.options = case, options
        self.shape_4d = shape if len(shape) == 4 else (-1, 1, 1, shape[-1])

    def call(self, x, gamma, beta, mean, var, is_training):
        """Output, and mean and variance that the operation returns."""
        y, mean, var = tf.compat.v1.nn.fused_batch_norm(
            tf.reshape(x, self.shape_4d), gamma, beta, mean, var, is_training=is_training, **self.options
        )
        return tf.reshape(y, x.shape), mean, var

    def train(self):
        """Three training steps from mean 0 and variance 1, and gradients of the first."""
        affine = tf.constant(self.case.gamma), tf.constant(self.case.beta)
        mean, var = initial = tf.zeros_like(self.case.gamma), tf.ones_like(self.case.gamma)

        def call(x, gamma, beta):
            return self.call(x, gamma, beta, *initial, is_training=True)[:1]

        results = differentiate(call, self.case)[0]
        for step, x in enumerate(self.case.x_steps, start=1):
            _, mean, var = self.call(tf.constant(x), *affine, mean, var, is_training=True)
            results |= {f"running_mean_{step}": mean, f"running_var_{step}": var}
        return results, (mean, var)

    def evaluate(self, state):
        """Evaluation with a state, and its gradients."""

        def call(x, gamma, beta):
            return self.call(x, gamma, beta, *state, is_training=False)[:1]

        return differentiate(call, self.case, "_eval_3")[0]


def compute_plain(case):
    """Output and gradients of a training step, and the batch's moments."""
    case.move_channels(-1)

    def call(x, gamma, beta):
        mean, var = tf.nn.moments(x, axes=list(range(x.ndim - 1)))
        return tf.nn.batch_normalization(x, mean, var, beta, gamma, **PLAIN), mean, var

    results, mean, var = differentiate(call, case)
    return results | {"batch_mean": mean, "batch_var": var}


def add_fused(archive, dtype, name, config, options):
    """Training, then evaluation after it and with the statistics of inputs.npz."""
    fused = Fused(Case(name, dtype), FUSED | options)
    case = fused.case
    state = stored = tf.constant(case.rmean0), tf.constant(case.rvar0)
    with archive.record_error(f"{dtype}/{name}/{config}/train"):
        results, state = fused.train()
        archive.add(dtype, name, config, results)
    with archive.record_error(f"{dtype}/{name}/{config}/eval"):
        results = fused.evaluate(state) | {"y_eval_r0": fused.evaluate(stored)["y_eval_3"]}
        archive.add(dtype, name, config, results)


def make():
    """The fused operation in float32, the plain one in both dtypes, and the fused one's refusal of float64."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    archive = Archive(f"TensorFlow {tf.__version__} CPU eager")
    for name, config, options in FUSED_CONFIGS:
        archive.add_config(name, config, {"op": "tf.compat.v1.nn.fused_batch_norm"} | FUSED | options)
        add_fused(archive, "f32", name, config, options)
    for name in CASES:
        archive.add_config(name, "plain_default", {"op": "tf.nn.moments + tf.nn.batch_normalization"} | PLAIN)
        for dtype in DTYPES:
            archive.add(dtype, name, "plain_default", compute_plain(Case(name, dtype)))
    add_fused(archive, "f64", "d4", "fused_default", {})
    return archive


if __name__ == "__main__":
    run("tensorflow", make)
