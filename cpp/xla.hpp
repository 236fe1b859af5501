// The targets of XLA's foreign function interface, for the bindings to hand to JAX by their addresses.
#pragma once

struct XLA_FFI_Error;
struct XLA_FFI_CallFrame;

namespace batchnorm {

extern "C" XLA_FFI_Error* xla_forward(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* xla_backward(XLA_FFI_CallFrame* frame);

}  // namespace batchnorm
