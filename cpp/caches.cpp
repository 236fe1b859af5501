#include "caches.hpp"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

#include <atomic>
#include <fstream>
#include <string>

namespace batchnorm {
namespace {

// For machines that report nothing: the sizes of a common server processor. Of other architectures, those that report a
// second level and no third have none, so that the second is the last.
constexpr Caches unknown = {1 << 20, 32 << 20};
#ifdef __x86_64__
constexpr bool may_hide_third_level = true;  // as some virtual machines do
#else
constexpr bool may_hide_third_level = false;
#endif

#if defined(__APPLE__)
int64_t reported_size(int level) {
  int64_t size = 0;
  size_t length = sizeof size;
  return sysctlbyname(level == 2 ? "hw.l2cachesize" : "hw.l3cachesize", &size, &length, nullptr, 0) == 0 ? size : 0;
}
#else
// The size of a level in Linux's sysfs, in kilobytes with a K; 0 if it is absent, as in some virtual machines.
int64_t reported_size(int level) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    int found = 0;
    int64_t kilobytes = 0;
    std::string type;
    std::ifstream(folder + "level") >> found;
    std::ifstream(folder + "type") >> type;
    std::ifstream(folder + "size") >> kilobytes;
    if (found == level && type != "Instruction") return kilobytes << 10;
  }
  return 0;
}
#endif

#ifdef __x86_64__
// The size of a level by CPUID; 0 if it is absent. Leaf 4 (Intel) and leaf 0x8000001D (AMD) have the same fields.
int64_t size_by_cpuid(unsigned level) {
  constexpr unsigned no_further_cache = 0, instruction_cache = 2;
  for (const unsigned leaf : {4u, 0x8000001Du})
    for (unsigned index = 0; index < 8; ++index) {
      unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
      if (!__get_cpuid_count(leaf, index, &eax, &ebx, &ecx, &edx) || (eax & 31) == no_further_cache) break;
      if ((eax >> 5 & 7) != level || (eax & 31) == instruction_cache) continue;
      const int64_t ways = (ebx >> 22) + 1, partitions = (ebx >> 12 & 0x3ff) + 1, line = (ebx & 0xfff) + 1;
      return ways * partitions * line * (static_cast<int64_t>(ecx) + 1);
    }
  return 0;
}
#else
int64_t size_by_cpuid(unsigned) { return 0; }
#endif

int64_t size_of_level(int level, int64_t otherwise) {
  if (const int64_t size = reported_size(level)) return size;
  if (const int64_t size = size_by_cpuid(level)) return size;
  return otherwise;
}

// Written under the GIL, but read by XLA's threads without it.
std::atomic<int64_t> l2 = size_of_level(2, unknown.l2),
                     l3 = size_of_level(3, may_hide_third_level ? unknown.l3 : l2.load());

}  // namespace

Caches caches() { return {l2.load(std::memory_order_relaxed), l3.load(std::memory_order_relaxed)}; }

void set_caches(Caches sizes) {
  if (sizes.l2) l2.store(sizes.l2, std::memory_order_relaxed);
  if (sizes.l3) l3.store(sizes.l3, std::memory_order_relaxed);
}

}  // namespace batchnorm
