// The targets of XLA's foreign function interface, whose addresses the bindings give to JAX.
#pragma once

#include "xla_abi.hpp"

namespace batchnorm {

extern "C" xla::Error* xla_forward(xla::CallFrame* frame);
extern "C" xla::Error* xla_backward(xla::CallFrame* frame);
extern "C" xla::Error* xla_advance(xla::CallFrame* frame);

}  // namespace batchnorm
