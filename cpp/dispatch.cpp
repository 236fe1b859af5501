#include "dispatch.hpp"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>

namespace batchnorm {

// CMakeLists.txt defines which of these are compiled; without its definitions, only the baseline is.
namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }

namespace {

#ifdef __x86_64__

// Asks CPUID directly, because `__builtin_cpu_supports` of Clang 14 does not know this feature's name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

#endif

// Written under the GIL, but read by XLA's threads without it. Relaxed, because nothing is read through them but
// `Kernels`, which are constant.
std::atomic<const Kernels*> chosen = nullptr;
std::atomic<int> default_threads = 0;

// OpenMP's pool does not survive a fork: a child process that requests a second thread would wait forever.
std::atomic<bool> is_forked_child = false;
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true, std::memory_order_relaxed); });

// With fewer elements for each thread, waking a thread costs more than it computes.
constexpr int64_t min_elements_per_thread = 32 << 10;

}  // namespace

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> supported;
#ifdef __x86_64__
  __builtin_cpu_init();
#endif
#ifdef BATCHNORM_HAS_AVX512BF16
  if (has_avx512bf16()) supported.push_back(&avx512bf16::kernels);
#endif
#ifdef BATCHNORM_HAS_AVX512
  if (has_avx512()) supported.push_back(&avx512::kernels);
#endif
#ifdef BATCHNORM_HAS_AVX2
  if (has_avx2()) supported.push_back(&avx2::kernels);
#endif
#ifdef BATCHNORM_HAS_NEON
  supported.push_back(&neon::kernels);
#endif
#ifndef BATCHNORM_WITHOUT_BASELINE
  supported.push_back(&baseline::kernels);
#endif
  return supported;
}

const Kernels& chosen_kernels() { return *chosen.load(std::memory_order_relaxed); }

void choose_kernels(const char* name) {
  const auto supported = supported_kernels();
  if (supported.empty())
    throw std::invalid_argument(
        "this machine has none of the instruction sets that are compiled in: build without BATCHNORM_ISAS");
  const auto choose = [](const Kernels* kernels) { chosen.store(kernels, std::memory_order_relaxed); };
  if (!name || !*name) return choose(supported.front());
  std::string message = "the instruction set ";
  message.append(name).append(" is not one of those that are compiled in and that this machine has:");
  for (const Kernels* kernels : supported) {
    if (std::string(kernels->name) == name) return choose(kernels);
    message.append(" ").append(kernels->name);
  }
  throw std::invalid_argument(message);
}

int num_threads() {
  if (is_forked_child.load(std::memory_order_relaxed)) return 1;
  const int threads = default_threads.load(std::memory_order_relaxed);
  return threads ? threads : omp_get_max_threads();
}

void set_num_threads(int threads) { default_threads.store(threads, std::memory_order_relaxed); }

// Replaces a mask of leading elements that is the same for all channels by lengths, and a mask of all elements by none,
// so that the kernels traverse whole rows. This reads the mask, which has the size of one channel.
void simplify_mask(Mask& mask, int64_t N, int64_t S, std::unique_ptr<int64_t[]>& lengths) {
  const Tensor& bytes = mask.bytes;
  if (!bytes.data || bytes.c != 0) return;
  lengths.reset(new int64_t[N]);
  bool is_full = true;
  for (int64_t n = 0; n < N; ++n) {
    const uint8_t* const row = static_cast<const uint8_t*>(bytes.data) + n * bytes.n;
    int64_t length = 0;
    while (length < S && row[length * bytes.s]) ++length;
    for (int64_t s = length; s < S; ++s)
      if (row[s * bytes.s]) return;
    lengths[n] = length;
    is_full = is_full && length == S;
  }
  if (S == 1 && !is_full) return;  // rows of one element are traversed in runs anyway
  mask.bytes = {};
  mask.lengths = is_full ? nullptr : lengths.get();
}

bool compute_with_plan(Operation operation, Problem& problem) {
  const int64_t elements = problem.N * problem.C * problem.S;
  problem.threads = static_cast<int>(std::clamp<int64_t>(elements / min_elements_per_thread, 1, problem.threads));
  Plan plan;
  if (!make_plan(problem, plan)) return false;
  alignas(64) char stack_buffer[16 << 10];
  std::unique_ptr<char[]> heap_buffer;
  char* workspace = stack_buffer;
  if (plan.workspace_bytes > static_cast<int64_t>(sizeof stack_buffer)) {
    heap_buffer.reset(new char[plan.workspace_bytes]);
    workspace = heap_buffer.get();
  }
  const Kernels& kernels = chosen_kernels();
  (operation == Operation::forward ? kernels.forward : kernels.backward)(problem, plan, workspace);
  return true;
}

bool compute(Operation operation, Problem& problem) {
  if (is_forked_child.load(std::memory_order_relaxed) || omp_in_parallel()) problem.threads = 1;
  if (problem.C == 0) return true;
  std::unique_ptr<int64_t[]> lengths;
  const Mask mask = problem.mask;
  simplify_mask(problem.mask, problem.N, problem.S, lengths);
  const bool is_done = compute_with_plan(operation, problem);
  problem.mask = mask;  // XLA's calls step through the masks of their lanes
  return is_done;
}

}  // namespace batchnorm
