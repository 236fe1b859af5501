// Random problems with exactly the memory that they may access.
#pragma once

#include <cstdlib>
#include <memory>

#include "naive.hpp"

namespace batchnorm {

inline constexpr Dtype dtypes[] = {
    Dtype::float32,
#ifdef BATCHNORM_TEST_DOUBLE
    Dtype::float64,
#endif
#ifdef BATCHNORM_TEST_BFLOAT16
    Dtype::bfloat16,
#endif
};

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

}  // namespace batchnorm
