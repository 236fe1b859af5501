"""Compute returnn_tf.npz: the layer `batch_norm` of RETURNN with the TensorFlow backend, as a graph.

    python -m pip install numpy==2.4.6 tensorflow-cpu==2.21.0 dm-tree==0.1.10        # Python 3.11
    python -m pip install returnn==1.20261022.211313
    python run_returnn_tf.py FOLDER

Float32, on one thread: with several the sums have other last bits. The prefix `bv11` or `bv16` of a config is the
behavior version. In the case `seq` time is a dynamic dimension, and dy is 0 on padding.

A training step also runs the network's control dependencies for after a step, which update the statistics;
`running_mean_after_plain_run` is the mean after a training run without them. `running_*_after_eval` is the state after
the evaluation of `y_eval_3`. Version 11 updates it in evaluation too, hence has no `y_eval_init`.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import returnn
import tensorflow as tf
from archive import Archive, Case, run
from returnn.config import Config
from returnn.tf.network import TFNetwork
from returnn.util.basic import BehaviorVersion

NODELAY = {"masked_time": True, "momentum": 0.3, "delay_sample_update": False, "epsilon": 1e-5}
#: Behavior version -> (case, config, arguments of the layer).
CONFIGS = {
    version: [
        ("seq", "masked_time_True", {"masked_time": True}),
        ("seq", "masked_time_False", {"masked_time": False}),
        ("d2", "default", {"masked_time": False}),
        ("d4", "default", {"masked_time": False}),
        *([("seq", "masked_nodelay_mom0.3", NODELAY)] if version == 16 else []),
    ]
    for version in (16, 11)
}


class Network:
    """A network of one batch norm with the parameters of a case, in a session of its own."""

    def __init__(self, case, options):
        self.case = case
        self.train_flag = tf.compat.v1.placeholder(tf.bool, shape=(), name="train_flag")
        shape = (None, case.x.shape[-1]) if case.lengths is not None else case.x.shape[1:]
        data = {"dim": case.x.shape[case.channel_axis], "shape": shape}
        if case.lengths is None:
            data |= {"feature_dim_axis": case.channel_axis, "time_dim_axis": None}
        config = Config({"extern_data": {"data": data}})
        self.network = TFNetwork(config=config, train_flag=self.train_flag)
        self.network.construct_from_dict({"output": {"class": "batch_norm", "from": "data", **options}})
        self.layer = self.network.get_default_output_layer()
        self.data = self.network.extern_data.data["data"]
        self.y = self.layer.output.placeholder
        self.updates = self.network.get_post_control_dependencies()
        self.parameters = {name.split("_")[-1]: parameter for name, parameter in self.layer.params.items()}
        self.session = tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1))
        self.initialize()

    def initialize(self):
        """Set the initial state and the parameters of the case."""
        self.session.run(tf.compat.v1.global_variables_initializer())
        for name in ("gamma", "beta"):
            variable = self.parameters[name]
            variable.load(getattr(self.case, name).reshape(variable.shape), self.session)

    def run(self, fetches, x, is_training):
        """Values of tensors for a batch."""
        feed = {self.data.placeholder: x, self.train_flag: is_training}
        if self.case.lengths is not None:
            feed[self.data.get_sequence_lengths()] = self.case.lengths
        return self.session.run(fetches, feed)

    def state(self):
        """Running mean and variance, of shape (C,)."""
        mean, var = self.session.run([self.parameters[name] for name in ("mean", "variance")])
        return mean.ravel(), var.ravel()

    def restore(self, y):
        """An output in the layout of inputs.npz."""
        return np.swapaxes(y, 0, 1) if self.layer.output.is_time_major else y


def compute(case, version, options):
    """Three training steps, gradients of the first, and evaluation before and after them."""
    if case.lengths is not None:
        case.pad(None)
    network = Network(case, options)
    results = {}
    if version > 11:
        results["y_eval_init"] = network.restore(network.run(network.y, case.x, False))
    results["output_is_time_major"] = np.array(bool(network.layer.output.is_time_major))
    inputs = [network.data.placeholder, network.parameters["gamma"], network.parameters["beta"]]
    gradients = tf.gradients(network.y, inputs, tf.constant(network.restore(case.dy)))
    y, dx, dgamma, dbeta = network.run([network.y, *gradients], case.x, True)
    results |= {"y": network.restore(y), "dx": dx, "dgamma": dgamma.ravel(), "dbeta": dbeta.ravel()}
    results["running_mean_after_plain_run"] = network.state()[0]
    network.initialize()
    for step, x in enumerate(case.x_steps, start=1):
        network.run([network.y, *network.updates], x, True)
        results[f"running_mean_{step}"], results[f"running_var_{step}"] = network.state()
    y, *_ = network.run([network.y, *network.updates], case.x, False)
    results["y_eval_3"] = network.restore(y)
    results["running_mean_after_eval"], results["running_var_after_eval"] = network.state()
    return results


def make():
    """All configurations, in float32."""
    tf.compat.v1.disable_eager_execution()
    archive = Archive(f"RETURNN {returnn.__version__} TF backend BatchNormLayer, TF {tf.__version__}")
    for version, configs in CONFIGS.items():
        BehaviorVersion._reset()  # its own tests switch versions like this
        BehaviorVersion.set(version)
        for name, config, options in configs:
            config = f"bv{version}_{config}"
            archive.add_config(name, config, options | {"behavior_version": version})
            with tf.Graph().as_default():
                archive.add("f32", name, config, compute(Case(name, "f32"), version, options))
    return archive


if __name__ == "__main__":
    run("returnn_tf", make)
