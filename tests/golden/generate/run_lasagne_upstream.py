"""Compute lasagne_upstream_02dev.npz: the `BatchNormLayer` that Lasagne itself has later than the gist.

In Python 3.7, without a compiler:

    python -m pip install numpy==1.16.6 scipy==1.2.3 Theano==1.0.5
    python -m pip install https://github.com/Lasagne/Lasagne/archive/5d3c63c.zip
    THEANO_FLAGS=cxx= python run_lasagne_upstream.py FOLDER

Its state is the mean and the inverse deviation. Channels are on axis 1, except in the config `axes_01`.
"""
# ruff: noqa: B905, RUF005, UP031

from collections import OrderedDict

import lasagne
import theano
from archive import CASES, DTYPES, Archive, Case, run
from theano import tensor

#: (case, config, arguments of the layer).
CONFIGS = [(case, "default", {}) for case in CASES if case not in ("seq", "single4")]
CONFIGS += [("seq", "axes_01", {"axes": (0, 1)}), ("d4", "eps1e-5_alpha0.5", {"epsilon": 1e-5, "alpha": 0.5})]


def compute(case, **options):
    """Three training steps, gradients of the first, and evaluation before and after them."""
    layer = lasagne.layers.BatchNormLayer(lasagne.layers.InputLayer(case.x.shape), **options)
    layer.gamma.set_value(case.gamma)
    layer.beta.set_value(case.beta)
    x, dy = (tensor.TensorType(theano.config.floatX, (False,) * case.x.ndim)(name) for name in ("x", "dy"))
    y = lasagne.layers.get_output(layer, x)
    train = theano.function([x, dy], [y] + tensor.Lop(y, [x, layer.gamma, layer.beta], dy))
    evaluate = theano.function([x], lasagne.layers.get_output(layer, x, deterministic=True))
    results = OrderedDict(y_eval_init=evaluate(case.x))
    for step, batch in enumerate(case.x_steps, start=1):
        outputs = train(batch, case.dy)
        if step == 1:
            results.update(zip(("y", "dx", "dgamma", "dbeta"), outputs))
        for name in ("mean", "inv_std"):
            results["running_%s_%d" % (name, step)] = getattr(layer, name).get_value()
    results["y_eval_3"] = evaluate(case.x)
    return results


def make():
    """All configurations in both dtypes."""
    archive = Archive("Lasagne %s BatchNormLayer, Theano %s" % (lasagne.__version__, theano.__version__))
    for dtype in DTYPES:
        theano.config.floatX = "float64" if dtype == "f64" else "float32"
        for name, config, options in CONFIGS:
            archive.add_config(name, config, options)
            archive.add(dtype, name, config, compute(Case(name, dtype), **options))
    return archive


if __name__ == "__main__":
    run("lasagne_upstream_02dev", make)
