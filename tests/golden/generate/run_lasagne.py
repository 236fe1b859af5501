"""Compute lasagne_theano105_py37.npz or lasagne_theano082_py27.npz: Jan Schlueter's gist on Theano and Lasagne 0.1.

The installed versions decide which. In Python 3.7, without a compiler:

    python -m pip install numpy==1.16.6 scipy==1.2.3 Theano==1.0.5 Lasagne==0.1
    THEANO_FLAGS=cxx= python run_lasagne.py FOLDER GIST.py

In Python 2.7, where Theano compiles with g++; only some configurations, in float64:

    python -m pip install numpy==1.11.3 scipy==0.19.1 Theano==0.8.2 Lasagne==0.1
    python run_lasagne.py FOLDER GIST.py

GIST.py is https://gist.github.com/f0k/f1a6bd3c8585c400c190, saved as it is.

Theano 1.0.5 no longer has `theano.tensor.signal.downsample`, which Lasagne 0.1 imports for its pooling layers; an empty
module stands in for it, as no pooling is used. Statistics keep the reduced axes with size 1, and so do gamma and beta,
which are those of the case where they have its number of channels.
"""
# ruff: noqa: B905, RUF005, UP004, UP031

import imp
import platform
import sys
import types
from collections import OrderedDict

import numpy as np
import theano
import theano.tensor.signal
from archive import CASES, DTYPES, Archive, Case, run
from theano import tensor

if not theano.__version__.startswith("0."):
    theano.tensor.signal.downsample = types.ModuleType("theano.tensor.signal.downsample")
    sys.modules["theano.tensor.signal.downsample"] = theano.tensor.signal.downsample

import lasagne

#: Case -> (config, arguments of the layer); `initial` keeps gamma and beta as the layer has made them.
CONFIGS = OrderedDict((case, [("default", {})]) for case in CASES)
CONFIGS["d2"] += [
    ("default_initparams", {"initial": True}),
    ("axes0_int", {"axes": 0}),
    ("axes_0tuple", {"axes": (0,)}),
    ("axes_01", {"axes": (0, 1)}),
    ("axes_1", {"axes": 1}),
    ("eps1e-4_alpha0.1", {"epsilon": 1e-4, "alpha": 0.1}),
    ("eps0_alpha1", {"epsilon": 0, "alpha": 1}),
    ("rectify", {"nonlinearity": "rectify"}),
    ("tanh", {"nonlinearity": "tanh"}),
]
CONFIGS["d4"] += [
    ("axes_0", {"axes": 0}),
    ("axes_01", {"axes": (0, 1)}),
    ("axes_023", {"axes": (0, 2, 3)}),
    ("axes_0123", {"axes": (0, 1, 2, 3)}),
    ("eps1e-5_alpha0.9_rectify", {"epsilon": 1e-5, "alpha": 0.9, "nonlinearity": "rectify"}),
]
CONFIGS["seq"] += [("axes_01", {"axes": (0, 1)})]
CONFIGS["ill"] += [("eps1e-4", {"epsilon": 1e-4}), ("eps0", {"epsilon": 0})]
CONFIGS["const"] += [("eps0", {"epsilon": 0})]
#: What is kept of Theano 0.8.2, besides the config `default`.
KEPT_OF_082 = (("d2", "axes_01"), ("d4", "axes_01"), ("d4", "axes_0123"), ("seq", "axes_01"))


def make_parameters(case, shape):
    """gamma and beta of a shape: those of the case if they fit, else random ones."""
    if np.prod(shape) == len(case.gamma):
        return case.gamma.reshape(shape), case.beta.reshape(shape)
    random = np.random.RandomState(7)
    return [random.uniform(-limit, limit, shape).astype("float32").astype(case.dtype) for limit in (1.5, 1)]


class Functions(object):
    """Compiled functions of a batch norm: a training step with gradients, evaluation, and its gradients alone."""

    def __init__(self, layer, ndim, wrt=()):
        self.layer = layer
        x, dy = (tensor.TensorType(theano.config.floatX, (False,) * ndim)(name) for name in ("x", "dy"))
        wrt = [x] + list(wrt) + [layer.gamma, layer.beta]
        y = lasagne.layers.get_output(layer, x)
        self.train = theano.function([x, dy], [y] + tensor.Lop(y, wrt, dy))
        y = lasagne.layers.get_output(layer, x, deterministic=True)
        self.evaluate = theano.function([x], y)
        self.differentiate = theano.function([x, dy], tensor.Lop(y, wrt, dy))

    def compute(self, x_steps, dy, names):
        """Three training steps, gradients of the first by `names`, and evaluation before and after them."""
        results = OrderedDict(y_eval_init=self.evaluate(x_steps[0]))
        for step, x in enumerate(x_steps, start=1):
            outputs = self.train(x, dy)
            if step == 1:
                results.update(zip(("y",) + names, outputs))
            for name in ("mean", "std"):
                results["running_%s_%d" % (name, step)] = getattr(self.layer, name).get_value()
        results["y_eval_3"] = self.evaluate(x_steps[0])
        results.update(zip([name + "_eval_3" for name in names], self.differentiate(x_steps[0], dy)))
        return results


def compute(gist, case, initial=False, nonlinearity=None, **options):
    """One configuration of the layer alone."""
    if nonlinearity is not None:
        options["nonlinearity"] = getattr(lasagne.nonlinearities, nonlinearity)
    layer = gist.BatchNormLayer(lasagne.layers.InputLayer(case.x.shape), **options)
    if not initial:
        gamma, beta = make_parameters(case, layer.gamma.get_value().shape)
        layer.gamma.set_value(gamma)
        layer.beta.set_value(beta)
    results = OrderedDict(gamma=layer.gamma.get_value(), beta=layer.beta.get_value())
    results.update(Functions(layer, case.x.ndim).compute(case.x_steps, case.dy, ("dx", "dgamma", "dbeta")))
    return results


def make_wrapped(case, random):
    """A layer with weights and a bias, before `batch_norm(layer)` changes it."""
    incoming = lasagne.layers.InputLayer(case.x.shape)
    if case.name == "d2":
        weights = random.uniform(-0.6, 0.6, (5, 4)).astype("float32")
        return lasagne.layers.DenseLayer(incoming, 4, W=weights.astype(case.dtype))
    weights = random.uniform(-0.6, 0.6, (3, 4, 3, 2)).astype("float32")
    return lasagne.layers.Conv2DLayer(incoming, 3, (3, 2), W=weights.astype(case.dtype))


def describe(layer):
    """Names of the parameters of a layer, by tag."""
    return {
        "params_after": [p.name for p in lasagne.layers.get_all_params(layer)],
        "trainable_after": [p.name for p in lasagne.layers.get_all_params(layer, trainable=True)],
        "regularizable_after": [p.name for p in lasagne.layers.get_all_params(layer, regularizable=True)],
        "bn_nonlinearity": layer.nonlinearity.__name__,
        "bn_input_shape": list(layer.input_shape),
        "bn_axes": list(layer.axes),
        "stat_shape": list(layer.mean.get_value().shape),
    }


def compute_wrapped(gist, case):
    """`batch_norm(layer)` of a dense or convolutional layer, and what it makes of the parameters."""
    random = np.random.RandomState(42)
    wrapped = make_wrapped(case, random)
    before = {"params_before": [p.name for p in wrapped.get_params()]}
    before["nonlinearity_before"] = wrapped.nonlinearity.__name__
    layer = gist.batch_norm(wrapped)
    shape = layer.gamma.get_value().shape
    gamma, beta = [random.uniform(-limit, limit, shape).astype("float32") for limit in (1.5, 1)]
    dy = random.randn(*layer.output_shape).astype("float32").astype(case.dtype)
    layer.gamma.set_value(gamma.astype(case.dtype))
    layer.beta.set_value(beta.astype(case.dtype))
    x = tensor.TensorType(theano.config.floatX, (False,) * case.x.ndim)()
    pre_bn = theano.function([x], lasagne.layers.get_output(wrapped, x))(case.x)
    results = OrderedDict(x_steps=case.x_steps, W=wrapped.W.get_value(), gamma=gamma, beta=beta, dy=dy, pre_bn=pre_bn)
    names = ("dx", "dW", "dgamma", "dbeta")
    results.update(Functions(layer, case.x.ndim, [wrapped.W]).compute(case.x_steps, dy, names))
    for name in names:
        del results[name + "_eval_3"]
    return results, dict(describe(layer), layer_b_is_None=wrapped.b is None, **before)


def record_refusals(archive, gist):
    """Arguments that the gist does not take."""
    incoming = lasagne.layers.InputLayer((None, 5))
    archive.meta["configs"]["BatchNormLayer((None,5)) ok"] = [
        list(gist.BatchNormLayer(incoming).mean.get_value().shape)
    ]
    with archive.record_error("batch_norm(DenseLayer(b=None))"):
        gist.batch_norm(lasagne.layers.DenseLayer(lasagne.layers.InputLayer((8, 5)), 4, b=None))
    for axes in (1, -1):
        with archive.record_error("BatchNormLayer((None,5), axes=%d)" % axes):
            gist.BatchNormLayer(incoming, axes=axes)
    with archive.record_error("d2/axes=-1"):
        compute(gist, Case("d2"), axes=-1)


def make(path):
    """All configurations in both dtypes; with Theano 0.8.2 those that are kept, in float64."""
    gist = imp.load_source("gist", path)
    is_old = theano.__version__.startswith("0.")
    archive = Archive("Jan Schlueter's gist, original code, Theano %s + Lasagne 0.1" % theano.__version__)
    archive.meta["cxx"] = theano.config.cxx
    for dtype in ["f64"] if is_old else DTYPES:
        theano.config.floatX = "float64" if dtype == "f64" else "float32"
        for name in CASES:
            for config, options in CONFIGS[name]:
                if is_old and config != "default" and (name, config) not in KEPT_OF_082:
                    continue
                archive.add_config(name, config, options)
                archive.add(dtype, name, config, compute(gist, Case(name, dtype), **options))
        for name, config in (("d2", "batch_norm_dense"), ("d4", "batch_norm_conv2d")):
            results, archive.meta["configs"][config] = compute_wrapped(gist, Case(name, dtype))
            archive.add(dtype, config, "", results)
    theano.config.floatX = "float64"
    record_refusals(archive, gist)
    return archive


if __name__ == "__main__":
    major, minor = platform.python_version_tuple()[:2]
    run("lasagne_theano%s_py%s%s" % (theano.__version__.replace(".", ""), major, minor), make, "gist")
