// A team of threads: OpenMP, so that the process's one pool (PyTorch's, where it is loaded) does the work, or the
// helpers that the caller has.
#pragma once

#include <cstdint>

#include "helpers.hpp"

#ifdef BATCHNORM_PTHREADS  // for ThreadSanitizer, which does not see OpenMP's synchronisation
#include <pthread.h>

#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace batchnorm::BATCHNORM_ISA {

struct Team {
  int rank = 0, size = 1;
  Meeting* meeting = nullptr;  // of helpers
#ifdef BATCHNORM_PTHREADS
  pthread_barrier_t* gate = nullptr;
#endif

  void barrier() const {
    if (size == 1) return;
    if (meeting) return wait(*meeting, size);
#ifdef BATCHNORM_PTHREADS
    pthread_barrier_wait(gate);
#else
#pragma omp barrier
#endif
  }

  // This member's part of [begin, end): contiguous, as even as can be.
  struct Range { int64_t begin, end; };
  Range share(int64_t begin, int64_t end) const {
    const int64_t n = end - begin;
    return {begin + n * rank / size, begin + n * (rank + 1) / size};
  }
};

// Runs body(team) on each member of a team of at most `threads`.
template <class Body> void parallel(int threads, const Helpers* helpers, const Body& body) {
  if (threads <= 1) return body(Team{});
  if (helpers) {
    const auto member = [](const void* body, int rank, int size, Meeting* meeting) {
      (*static_cast<const Body*>(body))(Team{rank, size, meeting});
    };
    return with_helpers(*helpers, threads, member, &body);
  }
#ifdef BATCHNORM_PTHREADS
  pthread_barrier_t gate;
  pthread_barrier_init(&gate, nullptr, static_cast<unsigned>(threads));
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back([&, rank] { body(Team{rank, threads, nullptr, &gate}); });
  body(Team{0, threads, nullptr, &gate});
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&gate);
#else
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
#endif
}

}  // namespace batchnorm::BATCHNORM_ISA
