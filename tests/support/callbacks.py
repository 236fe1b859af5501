"""Programs of JAX that a callback has failed."""

import jax


def forget():
    """The runtime would report a failed program once more, at whichever barrier is next."""
    jax.jit(lambda: jax.debug.callback(lambda: None))()
    jax.effects_barrier()
