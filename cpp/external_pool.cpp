#include "external_pool.hpp"

#include <sched.h>

#include <atomic>

namespace batchnorm {
namespace {

// State shared by the threads. It outlives the work, because tasks may start late.
struct Work {
  void (*function)(const void* body, int rank);
  const void* body;
  std::atomic<int> references;
  std::atomic<int> entered{0};  // tasks; negative when no further task may enter
  std::atomic<int> left{0};

  void release() {
    if (references.fetch_sub(1) == 1) delete this;
  }
};

void pool_task(void* data) {
  Work* const work = static_cast<Work*>(data);
  int entered_before = work->entered.load();
  while (entered_before >= 0 && !work->entered.compare_exchange_weak(entered_before, entered_before + 1)) {}
  if (entered_before >= 0) {
    work->function(work->body, entered_before + 1);
    work->left.fetch_add(1);
  }
  work->release();
}

}  // namespace

void spin_wait(int spins) {
  constexpr int max_spins = 2000;
  if (spins >= max_spins) sched_yield();
#if defined(__x86_64__)
  else __builtin_ia32_pause();
#endif
}

void run_on_pool(const ExternalPool& pool, int threads, void (*function)(const void* body, int rank),
                 const void* body) {
  Work* const work = new Work{function, body, threads};
  for (int i = 1; i < threads; ++i) pool.schedule(pool.context, pool_task, work);
  function(body, 0);
  const int entered = work->entered.exchange(-1);
  for (int spins = 0; work->left.load() != entered; ++spins) spin_wait(spins);
  work->release();
}

}  // namespace batchnorm
