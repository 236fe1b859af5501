// The kernels of one instruction set. This file is compiled once for each, in the namespace BATCHNORM_ISA.
//
// Nothing included here may call a template or an inline function of the C++ standard library. Each of these would be
// compiled once per instruction set under the same name. The linker keeps an arbitrary copy, because the one-definition
// rule lets it assume that all are equal, and this copy may contain instructions that the machine lacks. Therefore
// `__builtin_` and `__atomic_` functions, which the compiler expands in place, and `min` and `max` of this namespace
// are used instead. Functions shared by all instruction sets (dtypes.hpp) are always inlined.
#include "backward.hpp"
#include "forward.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

template <template <class> class DriverOf> void run(const Problem& problem, const Plan& plan, void* workspace) {
  switch (problem.dtype) {
    case Dtype::float64: return DriverOf<double>(problem, plan, workspace).run();
    case Dtype::float32: return DriverOf<float>(problem, plan, workspace).run();
    case Dtype::bfloat16: return DriverOf<bfloat16>(problem, plan, workspace).run();
    case Dtype::float16: return DriverOf<float16>(problem, plan, workspace).run();
  }
}

void convert(const PerChannel& from, const PerChannel& to, int64_t C) {
  for (int64_t c = 0; c < C; ++c) write_channel(to, c, read_channel(from, c, 0));
}

}  // namespace

#define BATCHNORM_STRING_(name) #name
#define BATCHNORM_STRING(name) BATCHNORM_STRING_(name)

extern const Kernels kernels;
const Kernels kernels = {BATCHNORM_STRING(BATCHNORM_ISA), run<ForwardDriver>, run<BackwardDriver>, convert};

}  // namespace batchnorm::BATCHNORM_ISA
