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

struct Block {
  void* begin;
  int64_t bytes;
  Clock::time_point since;
};

struct Waiting {
  std::mutex mutex;
  std::vector<Block> blocks;  // the one that came back last at the end
  int64_t bytes = 0;

  Waiting() { blocks.reserve(most_waiting / smallest_block + 1); }  // so that giving back cannot fail
};

// Never destroyed: arrays outlive everything else at the end of a process. A child of a fork finds the lock free.
Waiting& waiting() {
  static Waiting* const all = [] {
    pthread_atfork([] { waiting().mutex.lock(); }, [] { waiting().mutex.unlock(); }, [] { waiting().mutex.unlock(); });
    return new Waiting;
  }();
  return *all;
}

int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Whole huge pages where there are several of them.
bool has_huge_pages(int64_t bytes) { return bytes >= 2 * huge_page; }
int64_t block_bytes(int64_t bytes) { return round_up(bytes, has_huge_pages(bytes) ? huge_page : 64 << 10); }

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

// The system gets the oldest blocks back, while `goes(block)`. Under the lock.
template <class Predicate> void release_oldest(Waiting& all, const Predicate& goes) {
  auto block = all.blocks.begin();
  for (; block != all.blocks.end() && goes(*block); ++block) {
    munmap(block->begin, block->bytes);
    all.bytes -= block->bytes;
  }
  all.blocks.erase(all.blocks.begin(), block);
}

}  // namespace

void* take_block(int64_t bytes) {
  bytes = block_bytes(bytes);
  {
    Waiting& all = waiting();
    const std::lock_guard lock(all.mutex);
    const auto found = std::find_if(all.blocks.rbegin(), all.blocks.rend(),
                                    [bytes](const Block& block) { return block.bytes == bytes; });
    if (found != all.blocks.rend()) {
      void* const begin = found->begin;
      all.bytes -= bytes;
      all.blocks.erase(std::next(found).base());
      return begin;
    }
  }
  void* block = map(bytes);
  if (!block) {
    release_blocks();
    block = map(bytes);
  }
  if (!block) throw std::bad_alloc();
  return block;
}

void give_back_block(void* block, int64_t bytes) {
  Waiting& all = waiting();
  const std::lock_guard lock(all.mutex);
  const Clock::time_point now = Clock::now();
  all.blocks.push_back({block, block_bytes(bytes), now});
  all.bytes += block_bytes(bytes);
  release_oldest(all, [&](const Block& oldest) {
    return all.bytes > most_waiting || now - oldest.since > std::chrono::seconds(longest_wait);
  });
}

int64_t waiting_bytes() {
  Waiting& all = waiting();
  const std::lock_guard lock(all.mutex);
  return all.bytes;
}

void release_blocks() {
  Waiting& all = waiting();
  const std::lock_guard lock(all.mutex);
  release_oldest(all, [](const Block&) { return true; });
}

}  // namespace batchnorm
