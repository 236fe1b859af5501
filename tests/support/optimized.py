"""JAX programs compiled with XLA's default optimization; `conftest.py` disables it for all others."""

from functools import partial

import jax

optimized_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
)
