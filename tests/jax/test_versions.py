"""An extension newer than JAX: registering calls that JAX does not know would keep it from starting."""

import subprocess
import sys

PROGRAM = """
import batchnorm._native as native
native.xla_version = (native.xla_version[0], 99)
import jax.numpy as jnp, batchnorm.jax as bnj
y, _ = bnj.batch_norm(jnp.asarray([[1.0], [3.0]]), training=True)
print(y.round(3).ravel().tolist())
try:
    bnj.batch_norm(jnp.ones((2, 1)), training=True, kernel="native")
except ValueError as error:
    print(error)
"""


def test_array_code_takes_over():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0] == "[-1.0, 1.0]", done.stderr
    assert "was compiled for 0.99; install JAX 0.8 or newer" in done.stdout
