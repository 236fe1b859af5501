// A team of threads: OpenMP's, so that the only pool of the process (PyTorch's, if it is loaded) does the work, or
// threads of a pool that the caller has.
#pragma once

#include <cassert>
#include <cstdint>

#include "external_pool.hpp"

#ifdef BATCHNORM_PTHREADS  // for ThreadSanitizer, which does not see OpenMP's synchronization
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace batchnorm::BATCHNORM_ISA {

// The current step of a team and its progress. Threads wait only for pieces already claimed, never for other threads: a
// thread that is late, or has lost its core, does not delay the rest.
struct Progress {
  uint64_t next = 0;  // step << piece_bits | its first unclaimed piece
  int64_t done = 0;   // number of completed pieces
};

// One thread of a team. All threads of a team go through the same steps.
class Team {
 public:
  struct Range { int64_t begin, end; };

  explicit Team(Progress& progress, int rank, int size) : rank(rank), size(size), progress_(&progress) {}
  Team() = default;  // a team of one thread

  const int rank = 0, size = 1;  // size: the maximal number of threads

  // One step: calls body(range) for pieces of [begin, end), each of at least `min_piece`, on all threads that are
  // available. Returns when all pieces are done, and at once if they were done before this thread started the step.
  template <class Body> void parallel_for(int64_t begin, int64_t end, int64_t min_piece, const Body& body) {
    if (size == 1) return body(Range{begin, end});
    // Enough pieces that threads finish together, few enough that claiming them costs next to nothing.
    constexpr int64_t pieces_per_thread = 8;
    const int64_t n = end - begin, wanted = (n + min_piece - 1) / min_piece, max_pieces = pieces_per_thread * size;
    const int64_t pieces = wanted < 1 ? 1 : wanted < max_pieces ? wanted : max_pieces;
    int64_t completed = 0;
    for (int64_t i; (i = claim(pieces)) >= 0; ++completed)
      body(Range{begin + n * i / pieces, begin + n * (i + 1) / pieces});
    complete(completed, pieces);
    ++step_;
    assert(step_ >> (64 - piece_bits) == 0);
  }

 private:
  // Half of the bits are for the pieces, of which a step has 8 for each thread, and half for the steps. A call has at
  // most nine steps, however large it is (a forward pass that computes sums twice). If the number of steps wrapped, no
  // thread would find its step, and work would silently be left out.
  static constexpr int piece_bits = 32;

  // Claims a piece of this step; negative if none is left.
  int64_t claim(int64_t pieces) const {
    uint64_t next = __atomic_load_n(&progress_->next, __ATOMIC_ACQUIRE);
    for (;;) {
      const int64_t piece = next & ((uint64_t{1} << piece_bits) - 1);
      if (next >> piece_bits != step_ || piece == pieces) return -1;
      if (__atomic_compare_exchange_n(&progress_->next, &next, next + 1, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return piece;
    }
  }

  // The thread that completes the last piece advances the team to the next step.
  void complete(int64_t completed, int64_t pieces) const {
    if (completed && __atomic_add_fetch(&progress_->done, completed, __ATOMIC_ACQ_REL) == pieces) {
      __atomic_store_n(&progress_->done, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&progress_->next, (step_ + 1) << piece_bits, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(&progress_->next, __ATOMIC_ACQUIRE) >> piece_bits == step_; ++spins)
      spin_wait(spins);
  }

  Progress* progress_ = nullptr;
  uint64_t step_ = 0;
};

// Runs body(team) on each thread of a team of at most `threads`.
template <class Body> void run_team(int threads, const ExternalPool* pool, const Body& body) {
  if (threads <= 1) {
    Team alone;
    return body(alone);
  }
  Progress progress;
  const auto run_member = [&](int rank) {
    Team team(progress, rank, threads);
    body(team);
  };
  if (pool)
    return run_on_pool(
        *pool, threads, [](const void* run, int rank) { (*static_cast<decltype(&run_member)>(run))(rank); },
        &run_member);
#ifdef BATCHNORM_PTHREADS
  std::vector<std::thread> workers;
  for (int rank = 1; rank < threads; ++rank) workers.emplace_back([&, rank] { run_member(rank); });
  run_member(0);
  for (std::thread& worker : workers) worker.join();
#else
#pragma omp parallel num_threads(threads)
  run_member(omp_get_thread_num());
#endif
}

}  // namespace batchnorm::BATCHNORM_ISA
