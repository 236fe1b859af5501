// Work on threads of another library's pool (XLA's), which may all be busy.
//
// A second pool beside it would compete for the same cores, because its threads spin while they wait. But work that
// waits for threads of an external pool can deadlock, if the threads of this pool wait for other work. So work starts
// on the calling thread. Threads of the pool join when they become available, and a task that runs after the work is
// done returns at once.
#pragma once

namespace batchnorm {

struct ExternalPool {
  void (*schedule)(void* context, void (*task)(void* data), void* data);
  void* context;
};

// Runs function(body, rank) on this thread, as rank 0, and on those of `threads - 1` scheduled tasks that start before
// it returns.
void run_on_pool(const ExternalPool& pool, int threads, void (*function)(const void* body, int rank), const void* body);

// One iteration of a spin wait, which yields the core if the wait takes longer than expected. `spins`: the calls so
// far.
void spin_wait(int spins);

}  // namespace batchnorm
