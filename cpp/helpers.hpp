// Work on threads of a pool that belongs to somebody else, XLA's, who may not have any to spare.
//
// A second pool beside it would fight for the same cores: its threads wait busily for what comes next. But a team that
// waits for its members could wait for ever for a pool whose threads wait in other teams. So the members are those that
// have come when the work begins, and whoever comes later goes away again.
#pragma once

#include <cstdint>

namespace batchnorm {

struct Helpers {
  void (*schedule)(void* pool, void (*task)(void* data), void* data);
  void* pool;
  int64_t patience;  // nanoseconds that the work waits for them
};

// Where the members of a team wait for each other.
struct Meeting {
  int arrived = 0, round = 0;
};
void wait(Meeting& meeting, int size);

// Runs member(body, rank, size, meeting) on a team of at most `threads`, this thread among them as rank 0.
void with_helpers(const Helpers& helpers, int threads,
                  void (*member)(const void* body, int rank, int size, Meeting* meeting), const void* body);

}  // namespace batchnorm
