"""The C++ kernels on JAX's arrays, as primitives; `kernel` is the interface, and registers them with XLA."""
