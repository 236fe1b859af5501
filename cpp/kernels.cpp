// The kernels of one instruction set: compiled once for each, under the name in BATCHNORM_ISA.
#include "backward.hpp"
#include "forward.hpp"

namespace batchnorm::BATCHNORM_ISA {
namespace {

template <template <class> class JobOf> void run(const Problem& problem, const Plan& plan, void* workspace) {
  switch (problem.dtype) {
    case Dtype::float64: return JobOf<double>(problem, plan, workspace).run();
    case Dtype::float32: return JobOf<float>(problem, plan, workspace).run();
    case Dtype::bfloat16: return JobOf<bfloat16>(problem, plan, workspace).run();
    case Dtype::float16: return JobOf<float16>(problem, plan, workspace).run();
  }
}

}  // namespace

#define BATCHNORM_STRING_(name) #name
#define BATCHNORM_STRING(name) BATCHNORM_STRING_(name)

extern const Kernels kernels;
const Kernels kernels = {BATCHNORM_STRING(BATCHNORM_ISA), run<ForwardJob>, run<BackwardJob>};

}  // namespace batchnorm::BATCHNORM_ISA
