// The targets of XLA's foreign function interface, for the bindings to hand to JAX by their addresses.
#pragma once

#include <utility>

struct XLA_FFI_Error;
struct XLA_FFI_CallFrame;

namespace batchnorm {

extern "C" XLA_FFI_Error* xla_forward(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* xla_backward(XLA_FFI_CallFrame* frame);

// Of the interface that these are compiled for, major and minor: JAX takes the same major one, and no larger minor one.
std::pair<int, int> xla_version();

}  // namespace batchnorm
