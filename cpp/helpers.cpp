#include "helpers.hpp"

#include <sched.h>

#include <atomic>

namespace batchnorm {
namespace {

// What the members share. It outlives the work: helpers may come to it late.
struct Call {
  void (*member)(const void* body, int rank);
  const void* body;
  std::atomic<int> references;
  std::atomic<int> entered{0};  // helpers; negative once nobody is let in any more
  std::atomic<int> left{0};

  void release() {
    if (references.fetch_sub(1) == 1) delete this;
  }
};

void help(void* data) {
  Call* const call = static_cast<Call*>(data);
  int before = call->entered.load();
  while (before >= 0 && !call->entered.compare_exchange_weak(before, before + 1)) {}
  if (before >= 0) {
    call->member(call->body, before + 1);
    call->left.fetch_add(1);
  }
  call->release();
}

}  // namespace

void relax(int spins) {
  constexpr int most = 2000;
  if (spins >= most) sched_yield();
#if defined(__x86_64__)
  else __builtin_ia32_pause();
#endif
}

void with_helpers(const Helpers& helpers, int threads, void (*member)(const void* body, int rank), const void* body) {
  Call* const call = new Call{member, body, threads};
  for (int i = 1; i < threads; ++i) helpers.schedule(helpers.pool, help, call);
  member(body, 0);
  const int entered = call->entered.exchange(-1);
  for (int spins = 0; call->left.load() != entered; ++spins) relax(spins);
  call->release();
}

}  // namespace batchnorm
