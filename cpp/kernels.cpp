// The kernels of one instruction set: compiled once for each, in the namespace BATCHNORM_ISA.
//
// Nothing that is included here may call a template or an inline function of the C++ standard library. Each instruction
// set's compilation would emit it under the one name, the linker keeps an arbitrary copy (the one-definition rule lets it
// take all for the same), and that copy may hold instructions which the machine lacks. So `__builtin_` and `__atomic_`
// functions, which the compiler expands in place, and `min` and `max` in our own namespace take their place. What is
// shared under one name (dtypes.hpp) is always inlined.
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
