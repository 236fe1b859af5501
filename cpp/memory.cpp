#include "memory.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <new>
#include <vector>

namespace batchnorm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t huge_page = 2 << 20;

struct CachedBuffer {
  void* begin;
  int64_t bytes;
  Clock::time_point freed_at;
};

struct Cache {
  std::mutex mutex;
  std::vector<CachedBuffer> buffers;  // in the order in which they were freed
  int64_t bytes = 0;

  Cache() { buffers.reserve(max_cached_bytes / min_pooled_bytes + 1); }  // so that freeing cannot fail
};

// Never destroyed, because arrays outlive static objects at the end of a process. A forked child finds the mutex
// unlocked.
Cache& the_cache() {
  static Cache* const cache = [] {
    pthread_atfork([] { the_cache().mutex.lock(); }, [] { the_cache().mutex.unlock(); },
                   [] { the_cache().mutex.unlock(); });
    return new Cache;
  }();
  return *cache;
}

int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Buffers of two or more huge pages are a number of whole ones.
bool has_huge_pages(int64_t bytes) { return bytes >= 2 * huge_page; }
int64_t buffer_bytes(int64_t bytes) { return round_up(bytes, has_huge_pages(bytes) ? huge_page : 64 << 10); }

void* map(int64_t bytes) {
  const int64_t excess = has_huge_pages(bytes) ? huge_page : 0;
  void* const mapped = mmap(nullptr, bytes + excess, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!excess) return mapped;
  char* const begin = static_cast<char*>(mapped);
  const int64_t head = -reinterpret_cast<uintptr_t>(mapped) % huge_page;
  if (head) munmap(begin, head);
  if (excess - head) munmap(begin + head + bytes, excess - head);
#ifdef MADV_HUGEPAGE
  madvise(begin + head, bytes, MADV_HUGEPAGE);
#endif
  return begin + head;
}

// Unmaps the oldest buffers while `is_released(buffer)`. The mutex must be locked.
template <class Predicate> void release_oldest(Cache& cache, const Predicate& is_released) {
  auto buffer = cache.buffers.begin();
  for (; buffer != cache.buffers.end() && is_released(*buffer); ++buffer) {
    munmap(buffer->begin, buffer->bytes);
    cache.bytes -= buffer->bytes;
  }
  cache.buffers.erase(cache.buffers.begin(), buffer);
}

}  // namespace

void* allocate_pooled(int64_t bytes) {
  bytes = buffer_bytes(bytes);
  {
    Cache& cache = the_cache();
    const std::lock_guard lock(cache.mutex);
    const auto found = std::find_if(cache.buffers.rbegin(), cache.buffers.rend(),
                                    [bytes](const CachedBuffer& buffer) { return buffer.bytes == bytes; });
    if (found != cache.buffers.rend()) {
      void* const begin = found->begin;
      cache.bytes -= bytes;
      cache.buffers.erase(std::next(found).base());
      return begin;
    }
  }
  void* buffer = map(bytes);
  if (!buffer) {
    release_cached();
    buffer = map(bytes);
  }
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

void deallocate_pooled(void* buffer, int64_t bytes) {
  Cache& cache = the_cache();
  const std::lock_guard lock(cache.mutex);
  const Clock::time_point now = Clock::now();
  cache.buffers.push_back({buffer, buffer_bytes(bytes), now});
  cache.bytes += buffer_bytes(bytes);
  release_oldest(cache, [&](const CachedBuffer& oldest) {
    return cache.bytes > max_cached_bytes || now - oldest.freed_at > std::chrono::seconds(max_idle_seconds);
  });
}

int64_t cached_bytes() {
  Cache& cache = the_cache();
  const std::lock_guard lock(cache.mutex);
  return cache.bytes;
}

void release_cached() {
  Cache& cache = the_cache();
  const std::lock_guard lock(cache.mutex);
  release_oldest(cache, [](const CachedBuffer&) { return true; });
}

}  // namespace batchnorm
