// Work on threads of a pool that belongs to somebody else, XLA's, who may not have any to spare.
//
// A second pool beside it would fight for the same cores: its threads wait busily for what comes next. But work that
// waits for helpers could wait for ever for a pool whose threads wait for other work. So it begins without them, they
// join in when they come, and whoever comes once it is done goes away again.
#pragma once

namespace batchnorm {

struct ExternalPool {
  void (*schedule)(void* context, void (*task)(void* data), void* data);
  void* context;
};

// Runs member(body, rank) on this thread, as rank 0, and on those of `threads - 1` helpers that come before it returns.
void run_on_pool(const ExternalPool& pool, int threads, void (*function)(const void* body, int rank), const void* body);

// Lets others have the core where what is waited for takes longer than it should. `spins`: the calls so far.
void spin_wait(int spins);

}  // namespace batchnorm
