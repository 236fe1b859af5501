#include "dispatch.hpp"

#ifdef BATCHNORM_HAS_X86
#include <cpuid.h>
#endif
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace batchnorm {

namespace baseline { extern const Kernels kernels; }
#ifdef BATCHNORM_HAS_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
#endif
#ifdef BATCHNORM_HAS_NEON
namespace neon { extern const Kernels kernels; }
#endif

#ifdef BATCHNORM_HAS_X86
namespace {

// By CPUID itself, what `__builtin_cpu_supports` of Clang 14 has no names for.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

}  // namespace
#endif

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> supported;
#ifdef BATCHNORM_HAS_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && has_avx512bf16()) supported.push_back(&avx512bf16::kernels);
  if (has_avx512) supported.push_back(&avx512::kernels);
  if (has_avx2) supported.push_back(&avx2::kernels);
#endif
#ifdef BATCHNORM_HAS_NEON
  supported.push_back(&neon::kernels);
#endif
  supported.push_back(&baseline::kernels);
  return supported;
}

namespace {

const Kernels* chosen = nullptr;
int default_threads = 0;

// OpenMP's pool does not survive a fork: a child that asked it for a second thread would wait for ever.
bool is_forked_child = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

// Below this many elements for each thread, waking it costs more than it computes.
constexpr int64_t elements_for_a_thread = 32 << 10;

}  // namespace

const Kernels& chosen_kernels() { return *chosen; }

void choose_kernels(const char* name) {
  const auto supported = supported_kernels();
  if (!name || !*name) {
    chosen = supported.front();
    return;
  }
  std::string message = "the instruction set ";
  message.append(name).append(" is not one of those that are compiled in and that this machine has:");
  for (const Kernels* kernels : supported) {
    if (std::string(kernels->name) == name) {
      chosen = kernels;
      return;
    }
    message.append(" ").append(kernels->name);
  }
  throw std::invalid_argument(message);
}

int num_threads() {
  if (is_forked_child) return 1;
  return default_threads ? default_threads : omp_get_max_threads();
}

void set_num_threads(int threads) { default_threads = threads; }

// A mask of leading elements, the same for all channels, as lengths, and one of all elements as none: the kernels then
// walk over whole rows. It costs a read of the mask, which is as large as a channel.
void simplify(Mask& mask, int64_t N, int64_t S, std::unique_ptr<int64_t[]>& lengths) {
  const Tensor& keep = mask.keep;
  if (!keep.data || keep.c != 0) return;
  lengths.reset(new int64_t[N]);
  bool is_whole = true;
  for (int64_t n = 0; n < N; ++n) {
    const uint8_t* const row = static_cast<const uint8_t*>(keep.data) + n * keep.n;
    int64_t length = 0;
    while (length < S && row[length * keep.s]) ++length;
    for (int64_t s = length; s < S; ++s)
      if (row[s * keep.s]) return;
    lengths[n] = length;
    is_whole = is_whole && length == S;
  }
  if (S == 1 && !is_whole) return;  // rows of one element are walked over in runs as they are
  mask.keep = {};
  mask.lengths = is_whole ? nullptr : lengths.get();
}

bool compute_simplified(Operation operation, Problem& problem) {
  const int64_t elements = problem.N * problem.C * problem.S;
  problem.threads = static_cast<int>(std::clamp<int64_t>(elements / elements_for_a_thread, 1, problem.threads));
  Plan plan;
  if (!make_plan(problem, plan)) return false;
  alignas(64) char small[16 << 10];
  std::unique_ptr<char[]> large;
  char* workspace = small;
  if (plan.workspace > static_cast<int64_t>(sizeof small)) {
    large.reset(new char[plan.workspace]);
    workspace = large.get();
  }
  (operation == Operation::forward ? chosen->forward : chosen->backward)(problem, plan, workspace);
  return true;
}

bool compute(Operation operation, Problem& problem) {
  if (is_forked_child || omp_in_parallel()) problem.threads = 1;
  if (problem.C == 0) return true;
  std::unique_ptr<int64_t[]> lengths;
  const Mask mask = problem.mask;
  simplify(problem.mask, problem.N, problem.S, lengths);
  const bool is_done = compute_simplified(operation, problem);
  problem.mask = mask;  // lanes of XLA step through it
  return is_done;
}

}  // namespace batchnorm
