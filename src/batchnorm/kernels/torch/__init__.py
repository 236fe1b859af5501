"""The C++ kernels for PyTorch's CPU tensors: `kernel` is the eager interface, `operators` serves compiled graphs."""
