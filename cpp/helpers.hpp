// Work on threads of a pool that belongs to somebody else, XLA's, who may not have any to spare.
//
// A second pool beside it would fight for the same cores: its threads wait busily for what comes next. But work that
// waits for helpers could wait for ever for a pool whose threads wait for other work. So it begins without them, they
// join in when they come, and whoever comes once it is done goes away again.
#pragma once

namespace batchnorm {

struct Helpers {
  void (*schedule)(void* pool, void (*task)(void* data), void* data);
  void* pool;
};

// Runs member(body, rank) on this thread, as rank 0, and on those of `threads - 1` helpers that come before it returns.
void with_helpers(const Helpers& helpers, int threads, void (*member)(const void* body, int rank), const void* body);

// Lets others have the core where what is waited for takes longer than it should. `spins`: the calls so far.
void relax(int spins);

}  // namespace batchnorm
