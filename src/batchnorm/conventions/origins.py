"""The conventions of the five public implementations that this library began with, as their texts define them."""

from batchnorm.convention import Convention, Names

#: float32(1e-5): these systems keep eps as a float32 even for float64 data.
EPS_1E5_FLOAT32 = 9.999999747378752e-06

RECORDS = (
    Convention(
        name="zygote-gist",
        source="A Zygote layer (Julia) whose statistics come back as gradients; run with Zygote 0.4.20. "
        "Its momentum field (0.1) is never used; decay is what that field means.",
        axis=1,
        eps=EPS_1E5_FLOAT32,
        eps_eval="absent",
        tracked="std_eps",
        running_correction=1,
        correction_on="tracked",
        decay=0.9,
        momentum_weights="new",
        names=Names("γ", "β", "μ", "σ"),
    ),
    Convention(
        name="lasagne-gist",
        source="BatchNormLayer and batch_norm(layer) for Theano and Lasagne 0.1; run with Theano 0.8.2 and 1.0.5",
        axis=1,
        eps=0.01,
        eps_train="outside",
        eps_eval="outside",
        tracked="std",
        decay=0.5,
        momentum_name="alpha",
        momentum_weights="new",
        names=Names("gamma", "beta", "mean", "std"),
    ),
    Convention(
        name="cs231n",
        source="batchnorm_forward and batchnorm_backward of a course exercise (CS231n), plain NumPy",
        axis=1,
        eps=1e-5,
        eps_eval="outside",
        decay=0.9,
        initial_spread=0.0,
        momentum_weights="old",
        names=Names("gamma", "beta", "running_mean", "running_var"),
    ),
    Convention(
        name="d2l",
        source="Dive into Deep Learning, chapter convolutional-modern/batch-norm, JAX tab; run with Flax 0.12.8. "
        "The record is what the text means, statistics of each channel; on channels-last images the code takes "
        "those of each row.",
        axis=-1,
        eps=1e-5,
        decay=0.9,
        momentum_weights="old",
        names=Names("gamma", "beta", "moving_mean", "moving_var"),
    ),
    Convention(
        name="returnn-common-demo",
        source="The BatchNorm of RETURNN-common's issue 89; ported, since it is not valid Python. "
        "gamma and beta are created and never applied; parameters of that time start at 0.",
        axis=-1,
        eps=1e-5,
        decay=0.9,
        initial_spread=0.0,
        momentum_weights="new",
        masked_output="normalized",
        affine="ignored",
        names=Names("gamma", "beta", "mean", "var"),
    ),
)
