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
#include <memory>
#include <thread>

#include "../backward.hpp"
#include "../forward.hpp"
#include "../memory.hpp"
#include "naive.hpp"

namespace batchnorm {
namespace {

constexpr Dtype dtypes[] = {
    Dtype::float32,
#ifdef BATCHNORM_TEST_DOUBLE
    Dtype::float64,
#endif
#ifdef BATCHNORM_TEST_BFLOAT16
    Dtype::bfloat16,
#endif
};

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

struct Random {
  uint64_t state;
  uint64_t next() { return state = state * 6364136223846793005u + 1442695040888963407u, state >> 33; }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T, size_t n> T pick(const T (&values)[n]) { return values[below(n)]; }
  double normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += static_cast<double>(next() % 65536) / 65536;
    return sum - 6;
  }
};

// A buffer of exactly this many bytes, all 0xff: NaN in each floating type.
struct ExactBuffer {
  explicit ExactBuffer(int64_t bytes) : memory(static_cast<char*>(std::malloc(bytes)), std::free), bytes(bytes) {
    std::memset(memory.get(), 0xff, bytes);
  }
  std::unique_ptr<char, void (*)(void*)> memory;
  int64_t bytes;
};

struct Memory {
  std::vector<ExactBuffer> buffers;

  char* allocate(int64_t bytes, int64_t misalignment = 0) {
    return buffers.emplace_back(misalignment + bytes).memory.get() + misalignment;
  }

  // Allocates exactly the elements that the strides of `t` reach, with `lead` elements before them, and one byte more
  // if `is_odd`.
  void allocate_tensor(Tensor& t, const Problem& p, int64_t size, int64_t lead, bool is_odd = false) {
    int64_t low = 0, high = 0;
    const int64_t sizes[] = {p.N, p.C, p.S}, strides[] = {t.n, t.c, t.s};
    const bool is_empty = p.N * p.C * p.S == 0;
    for (int i = 0; i < 3 && !is_empty; ++i) (strides[i] < 0 ? low : high) += (sizes[i] - 1) * strides[i];
    t.data = allocate((high - low + !is_empty + lead) * size, is_odd) + (lead - low) * size;
  }
};

// One problem with all of its memory. Two trials of one seed are the same but for the addresses of their buffers.
struct Trial {
  Trial(uint64_t seed, int threads) : random{seed * 2654435761u + 1} {
    for (int i = 0; i < 4; ++i) random.next();
    choose_sizes();
    p.threads = threads;
    is_backward = random.one_in(2);
    p.activation = static_cast<Activation>(random.below(9));
    p.slope = p.activation == Activation::leaky_relu ? 0.25 : 0;
    p.forward.computes_moments = !is_backward && !random.one_in(4);
    p.forward.eps = random.one_in(4) ? 0.5 : 1e-5;
    p.forward.eps_placement = static_cast<EpsPlacement>(random.below(4) % 3);
    p.forward.correction = random.one_in(4);
    p.backward.through_statistics = !random.one_in(4);
    has_specials = random.one_in(6);
    choose_mask();
    p.normalized_padding = random.one_in(3);
    choose_tensors();
    choose_channels();
  }

  Problem p = {};
  Memory memory;
  std::vector<Tensor*> written;
  bool is_backward;
  bool has_specials;  // infinities and NaN, for which naive loops give other results
  Random random;
  std::vector<int64_t> lengths;

 private:
  void choose_sizes() {
    p.dtype = random.pick(dtypes);
    const int64_t lengths[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19, 31, 33, 35, 67, 255, 256, 257};
    const int64_t few[] = {1, 1, 2, 3, 5, 33};
    p.N = random.pick(few), p.C = random.pick(few), p.S = random.pick(few);
    int64_t* const chosen[] = {&p.N, &p.C, &p.S};
    *random.pick(chosen) = random.pick(lengths);
    if (random.one_in(12)) (random.one_in(2) ? p.N : p.S) = 0;  // not C: without channels there is nothing to plan
    const auto sizes = [&](int64_t N, int64_t C, int64_t S) {
      p.N = 1 + random.below(N), p.C = 1 + random.below(C), p.S = 1 + random.below(S);
    };
    if (random.one_in(40)) sizes(3, 2, 17000);
    if (random.one_in(40)) sizes(9, 2500, 2);
    if (random.one_in(40)) sizes(900, 40, 3);
  }

  void choose_mask() {
    const int64_t kind = random.below(6);
    if (kind == 1) {
      for (int64_t n = 0; n < p.N; ++n) lengths.push_back(random.below(p.S + 1));
      lengths.shrink_to_fit();
      p.mask.lengths = lengths.data();
    }
    if (kind < 2 || kind > 4 || p.N * p.C * p.S == 0) return;
    Tensor& mask = p.mask.bytes;
    const bool n = !random.one_in(4), c = kind == 3 || random.one_in(2), s = kind == 4 || random.one_in(2);
    const int64_t sign = random.one_in(8) ? -1 : 1;
    if (random.one_in(2)) mask = {nullptr, n * p.C * p.S, c * p.S, s * sign};
    else mask = {nullptr, n * p.C * p.S, c * sign, s * p.C};
    memory.allocate_tensor(mask, p, 1, 0);
    for (int64_t i = 0; i < p.N; ++i)
      for (int64_t j = 0; j < p.C; ++j)
        for (int64_t k = 0; k < p.S; ++k)
          static_cast<uint8_t*>(mask.data)[i * mask.n + j * mask.c + k * mask.s] =
              static_cast<uint8_t>(random.one_in(3) ? 0 : 1 + random.below(255));
  }

  double random_value(int64_t deviation, int64_t mean) {
    if (!has_specials || !random.one_in(20)) return random.normal() * deviation + mean;
    if (random.one_in(3)) return random.one_in(2) ? INFINITY : -INFINITY;
    // A quiet NaN of either sign, with random bits that fit in the narrowest type.
    const uint64_t sign = random.below(2), fraction = random.below(64);
    const uint64_t bits = sign << 63 | uint64_t{0x7ff8} << 48 | fraction << 45;
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
  }

  void choose_tensors() {
    const bool is_channels_last = random.one_in(2), is_packed = !random.one_in(3), has_residual = random.one_in(3);
    const auto tensor = [&](Tensor& t, bool is_input) {
      const int64_t gap = is_packed ? 0 : random.below(4);
      if (is_channels_last) t = {nullptr, p.S * (p.C + gap), 1, p.C + gap};
      else t = {nullptr, p.C * (p.S + gap), p.S + gap, 1};
      if (!is_packed && random.one_in(4)) {
        if (is_channels_last) t = {nullptr, p.C, 1, p.N * p.C};
        else t = {nullptr, p.S, p.N * p.S, 1};
      }
      if (!is_packed && random.one_in(4)) t.n = -t.n;
      if (!is_packed && random.one_in(4)) (is_channels_last ? t.s : t.c) *= -1;
      if (is_input && random.one_in(12)) t.n = 0;
      if (is_input && random.one_in(12)) (is_channels_last ? t.s : t.c) = 0;
      const int64_t lead = random.one_in(2) ? 0 : random.below(4);
      memory.allocate_tensor(t, p, size_of(p.dtype), lead, random.one_in(4));
      if (!is_input) return written.push_back(&t);
      // Padding may be NaN, except in the dy of normalized padding.
      const bool is_dense = t.n && (p.C < 2 || t.c) && (p.S < 2 || t.s);
      const bool is_poisoned = is_dense && random.one_in(3) && !(&t == &p.backward.dy && p.normalized_padding);
      for (int64_t n = 0; n < p.N; ++n)
        for (int64_t c = 0; c < p.C; ++c)
          for (int64_t s = 0; s < p.S; ++s)
            naive::put(t.data, p.dtype, n * t.n + c * t.c + s * t.s,
                       is_poisoned && !naive::is_valid(p, n, c, s) ? NAN : random_value(1 + c % 3, c % 5));
    };
    tensor(p.x, true);
    if (has_residual) tensor(p.residual, true);
    if (!is_backward) {
      if (!p.forward.computes_moments || !random.one_in(5)) tensor(p.forward.y, false);
      return;
    }
    tensor(p.backward.dy, true);
    if (!random.one_in(5)) tensor(p.backward.dx, false);
    if (has_residual && !random.one_in(5)) tensor(p.backward.dresidual, false);
  }

  void choose_channels() {
    const Dtype statistics_dtype = p.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
    const int64_t bytes = p.C * size_of(statistics_dtype);
    const auto misalignment = [&] { return random.one_in(2) ? 0 : random.below(8); };
    void** const tables[] = {&p.mean, &p.mean_lo, &p.rstd};
    for (void** table : tables) {
      *table = memory.allocate(bytes, misalignment());
      for (int64_t c = 0; c < p.C && !p.forward.computes_moments; ++c) {
        const double size = table == &p.mean_lo ? 1e-4 : 1;
        naive::put(*table, statistics_dtype, c, table == &p.rstd ? 0.3 + random.below(4) : size * random.normal());
      }
    }
    if (p.forward.computes_moments && random.one_in(2)) p.forward.m2 = memory.allocate(bytes, misalignment());
    if ((p.forward.computes_moments && random.one_in(2)) || (is_backward && random.one_in(4)))
      p.xhat_scale = memory.allocate(bytes, misalignment());
    for (int64_t c = 0; c < p.C && p.xhat_scale && is_backward; ++c)
      naive::put(p.xhat_scale, statistics_dtype, c, 1 + random.below(3));
    const auto channels = [&](PerChannel& array, bool is_input) {
      array = {nullptr, static_cast<Dtype>(random.below(4)), 1 + random.below(2)};
      array.data = memory.allocate(((p.C ? p.C - 1 : 0) * array.stride + 1) * size_of(array.dtype), misalignment());
      for (int64_t c = 0; c < p.C && is_input; ++c)
        naive::put(array.data, array.dtype, c * array.stride,
                   has_specials ? random_value(1, 0) : 0.5 + 0.25 * random.below(9));
    };
    if (!random.one_in(4)) channels(p.gamma, true);
    if (!random.one_in(4)) channels(p.beta, true);
    if (!is_backward) {
      if (random.one_in(2)) p.count = memory.allocate(p.C * 8, misalignment());
      return;
    }
    if (!random.one_in(4)) channels(p.backward.dgamma, false);
    if (!random.one_in(4)) channels(p.backward.dbeta, false);
    p.count = memory.allocate(p.C * 8, misalignment());
    for (int64_t c = 0; c < p.C; ++c) {
      int64_t count = 0;
      for (int64_t n = 0; n < p.N; ++n)
        for (int64_t s = 0; s < p.S; ++s) count += naive::is_valid(p, n, c, s);
      set_element(p.count, c, count);
    }
  }
};

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
