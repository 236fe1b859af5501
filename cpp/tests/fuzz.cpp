// Random problems for the kernels of one instruction set, to be run under a sanitizer. Every array has a buffer of
// exactly the bytes that may be accessed, which are NaN where nothing may be read. Results are compared with naive
// loops, and the results of several threads with the bits of one thread; only the latter if there are infinities and
// NaN (with various bits) among the elements. Some arrays are not aligned to their elements. The pool for results and
// the steps of a team are tested too.
//
//     fuzz [problems] [first seed]
//
// tests/kernels/sanitize.sh compiles and runs it for float, and for double and bfloat16 where it says so (float16
// differs from bfloat16 only in its conversion), because the kernels of one type take half a minute to compile.
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../backward.hpp"
#include "../forward.hpp"
#include "../memory.hpp"
#include "trial.hpp"

namespace batchnorm {
namespace {

template <template <class> class DriverOf> void run(const Problem& problem, const Plan& plan, void* workspace) {
  switch (problem.dtype) {
#ifdef BATCHNORM_TEST_DOUBLE
    case Dtype::float64: return DriverOf<double>(problem, plan, workspace).run();
#endif
#ifdef BATCHNORM_TEST_BFLOAT16
    case Dtype::bfloat16: return DriverOf<bfloat16>(problem, plan, workspace).run();
#endif
    default: return DriverOf<float>(problem, plan, workspace).run();
  }
}

// z this close to a kink may be on its other side in the precision of the kernels, so gradients are not compared then.
constexpr double kink_margin = 1e-3;

struct Check {
  uint64_t seed;
  int failures = 0;

  void expect_near(const char* name, double ours, double exact, double tolerance, int64_t i) {
    if (std::abs(ours - exact) <= tolerance) return;
    if (failures++ < 3) std::printf("seed %lu: %s[%ld] is %.9g, not %.9g\n", seed, name, i, ours, exact);
  }
};

// One unit in the last place of a number of the type.
double ulp_of(Dtype dtype) {
  const double ulps[] = {0x1p-23, 0x1p-52, 0x1p-7, 0x1p-10};
  return ulps[static_cast<int>(dtype)];
}

int compare(const Trial& trial, uint64_t seed) {
  const Problem& p = trial.p;
  const Dtype statistics_dtype = p.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const naive::Results exact = naive::results(p);
  Check check{seed};
  const double tolerance = p.dtype == Dtype::float64 ? 1e-12 : 2e-5, ulp = ulp_of(p.dtype);
  bool is_at_kink = false;
  for (const double z : exact.z)
    for (const double kink : naive::kinks_of(p.activation)) is_at_kink |= std::abs(z - kink) < kink_margin;
  const auto tensor = [&](const char* name, const Tensor& t, const std::vector<double>& values) {
    if (!t.data) return;
    double largest = 1;
    for (const double value : values) largest = std::max(largest, std::abs(value));
    for (int64_t n = 0, i = 0; n < p.N; ++n)
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t s = 0; s < p.S; ++s, ++i)
          check.expect_near(name, naive::get(t.data, p.dtype, n * t.n + c * t.c + s * t.s), values[i],
                            tolerance * largest + ulp * std::abs(values[i]), i);
  };
  const auto channels = [&](const char* name, const PerChannel& array, const std::vector<double>& values,
                            double scale) {
    const bool is_half = array.dtype == Dtype::float16;  // subnormal below 6e-5, in steps of 6e-8; ends at 65504
    for (int64_t c = 0; c < p.C && array.data; ++c)
      if (!is_half || std::abs(values[c]) < 65000)
        check.expect_near(name, naive::get(array.data, array.dtype, c * array.stride), values[c],
                          tolerance * scale + ulp_of(array.dtype) * std::abs(values[c]) + (is_half ? 6e-8 : 0), c);
  };
  tensor("y", p.forward.y, exact.y);
  if (p.forward.computes_moments && !trial.is_backward)
    for (int64_t c = 0; c < p.C; ++c) {
      const double std = std::sqrt(exact.var[c]);
      const double mean = naive::get(p.mean, statistics_dtype, c) + naive::get(p.mean_lo, statistics_dtype, c);
      const double m2 = exact.var[c] * static_cast<double>(exact.count[c]);
      check.expect_near("mean", mean, exact.mean[c], tolerance * (std + 1e-6), c);
      if (p.forward.m2)
        check.expect_near("m2", naive::get(p.forward.m2, statistics_dtype, c), m2, tolerance * m2 + 1e-9, c);
      if (p.count) check.expect_near("count", element_at<int64_t>(p.count, c), exact.count[c], 0, c);
      if (p.xhat_scale && std > 1e-3)
        check.expect_near("xhat_scale", naive::get(p.xhat_scale, statistics_dtype, c), exact.xhat_scale[c],
                          1e-4 * exact.xhat_scale[c], c);
      if (std > 1e-3)
        check.expect_near("rstd", naive::get(p.rstd, statistics_dtype, c), exact.rstd[c], tolerance * exact.rstd[c], c);
    }
  if (trial.is_backward && !is_at_kink) {
    tensor("dx", p.backward.dx, exact.dx);
    tensor("dresidual", p.backward.dresidual, exact.dresidual);
    const double scale = 10 + 4.0 * p.N * p.S;
    channels("dgamma", p.backward.dgamma, exact.dgamma, scale);
    channels("dbeta", p.backward.dbeta, exact.dbeta, scale);
  }
  return check.failures;
}

// Returns true if there is a plan for the problem.
bool run(Trial& trial, bool is_streaming) {
  Plan plan;
  if (!make_plan(trial.p, plan)) return false;
  plan.is_streaming |= is_streaming;
  char* workspace = trial.memory.allocate(plan.workspace_bytes);
  if (trial.is_backward) run<BATCHNORM_ISA::BackwardDriver>(trial.p, plan, workspace);
  else run<BATCHNORM_ISA::ForwardDriver>(trial.p, plan, workspace);
  return true;
}

// Threads allocate pooled buffers, write their own number into them and free them; a buffer that two threads had at the
// same time would contain another number. Returns how many buffers did.
int64_t count_shared_buffers(int threads) {
  int64_t failures = 0;
  BATCHNORM_ISA::run_team(threads, nullptr, [&](const BATCHNORM_ISA::Team& team) {
    for (int i = 0; i < 200; ++i) {
      const int64_t bytes = min_pooled_bytes + (i + team.rank) % 3 * 70000;
      char* const buffer = static_cast<char*>(allocate_pooled(bytes));
      const char id = static_cast<char>(team.rank + 1);
      for (int64_t at = 0; at < bytes; at += 4096) buffer[at] = id;
      for (int64_t at = 0; at < bytes; at += 4096)
        if (buffer[at] != id) __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
      deallocate_pooled(buffer, bytes);
      if (i % 50 == 0) release_cached();
    }
  });
  return failures;
}

// A team goes through more steps than 16 bits can count; every piece of every step must be done exactly once. Returns
// the number of steps for which this is not so.
int64_t count_incomplete_steps(int threads) {
  constexpr int64_t steps = 70000, pieces = 5;
  std::vector<int64_t> done(steps);
  BATCHNORM_ISA::run_team(threads, nullptr, [&](BATCHNORM_ISA::Team& team) {
    for (int64_t& step : done)
      team.parallel_for(0, pieces, 1, [&](BATCHNORM_ISA::Team::Range range) {
        __atomic_fetch_add(&step, range.end - range.begin, __ATOMIC_RELAXED);
      });
  });
  return steps - std::count(done.begin(), done.end(), pieces);
}

// Runs each task on a thread of its own, which may start early, during the work, or too late.
const ExternalPool pool{[](void*, void (*task)(void*), void* data) { std::thread(task, data).detach(); }, nullptr};

}  // namespace
}  // namespace batchnorm

int main(int count, char** arguments) {
  using namespace batchnorm;
  const uint64_t problems = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 2000;
  const uint64_t first_seed = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 0;
  uint64_t plans = 0, failures = (count_shared_buffers(4) != 0) + (count_incomplete_steps(2) != 0);
  for (uint64_t seed = first_seed; seed < first_seed + problems; ++seed) {
    const int threads = 2 + static_cast<int>(seed % 6);
    const bool is_streaming = seed % 4 == 3;
    Trial single(seed, 1), threaded(seed, threads);
    if (seed % 2) threaded.p.pool = &pool;
    if (!run(single, is_streaming)) continue;
    ++plans;
    failures += !single.has_specials && compare(single, seed) > 0;
    if (!run(threaded, is_streaming)) return std::printf("seed %lu: no plan for %d threads\n", seed, threads), 1;
    const bool is_same = std::equal(  // all but the last, which is the workspace
        single.memory.buffers.begin(), single.memory.buffers.end() - 1, threaded.memory.buffers.begin(),
        [](const ExactBuffer& a, const ExactBuffer& b) {
          return !std::memcmp(a.memory.get(), b.memory.get(), a.bytes);
        });
    if (!is_same) std::printf("seed %lu: other bits with %d threads\n", seed, threads), ++failures;
  }
  std::printf("%lu problems, %lu of them with a plan, %lu wrong\n", problems, plans, failures);
  return failures > 0 || plans * 2 < problems;
}
