"""The C++ kernels for JAX's arrays, as primitives; `kernel` is their interface and registers them with XLA."""
