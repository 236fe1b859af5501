#include "helpers.hpp"

#include <sched.h>

#include <atomic>
#include <chrono>

namespace batchnorm {
namespace {

// Waits busily, as what is waited for takes microseconds, but lets others have the core where that takes longer.
template <class Condition> void wait_until(const Condition& holds) {
  for (int spins = 0; !holds(); ++spins) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins >= 2000) sched_yield();
  }
}

// What the team shares. It outlives the work: helpers may come to it late.
struct Call {
  void (*member)(const void* body, int rank, int size, Meeting* meeting);
  const void* body;
  std::atomic<int> references;
  std::atomic<int> helpers{0};   // that have come; negative once nobody is let in any more
  std::atomic<int> size{0};      // of the team, once that is known
  std::atomic<int> finished{0};  // helpers
  Meeting meeting = {};

  void release() {
    if (references.fetch_sub(1) == 1) delete this;
  }
};

void help(void* data) {
  Call* const call = static_cast<Call*>(data);
  int before = call->helpers.load();
  while (before >= 0 && !call->helpers.compare_exchange_weak(before, before + 1)) {}
  if (before >= 0) {
    wait_until([&] { return call->size.load() != 0; });
    call->member(call->body, before + 1, call->size.load(), &call->meeting);
    call->finished.fetch_add(1);
  }
  call->release();
}

}  // namespace

void wait(Meeting& meeting, int size) {
  const int round = __atomic_load_n(&meeting.round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&meeting.arrived, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&meeting.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&meeting.round, round + 1, __ATOMIC_RELEASE);
  } else {
    wait_until([&] { return __atomic_load_n(&meeting.round, __ATOMIC_ACQUIRE) != round; });
  }
}

void with_helpers(const Helpers& helpers, int threads,
                  void (*member)(const void* body, int rank, int size, Meeting* meeting), const void* body) {
  Call* const call = new Call{member, body, threads};
  for (int i = 1; i < threads; ++i) helpers.schedule(helpers.pool, help, call);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::nanoseconds(helpers.patience);
  wait_until([&] { return call->helpers.load() == threads - 1 || Clock::now() >= end; });
  const int size = call->helpers.exchange(-1) + 1;
  call->size.store(size);
  member(body, 0, size, &call->meeting);
  wait_until([&] { return call->finished.load() == size - 1; });
  call->release();
}

}  // namespace batchnorm
