// The targets of XLA's foreign function interface, for the bindings to hand to JAX by their addresses.
#pragma once

#include "xla_abi.hpp"

namespace batchnorm {

extern "C" xla::Error* xla_forward(xla::CallFrame* frame);
extern "C" xla::Error* xla_backward(xla::CallFrame* frame);
extern "C" xla::Error* xla_advance(xla::CallFrame* frame);

}  // namespace batchnorm
