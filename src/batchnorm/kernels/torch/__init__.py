"""The C++ kernels on PyTorch's CPU tensors: `kernel` is their interface, `operators` that of compiled graphs."""
