"""Programs of JAX that are compiled as for users; `conftest.py` has all others compiled without optimization."""

from functools import partial

import jax

optimized_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
)
