// Walking a pass (see elements.hpp) over rows: reductions, whose sums end up in doubles, and maps, which store.
#pragma once

#include "elements.hpp"

namespace batchnorm::BATCHNORM_ISA {

// The sum of `length` doubles, in a fixed order.
inline double total(const double* p, int64_t length) {
  Vd sums[2] = {};
  int64_t j = 0;
  for (; j + 2 * width<Vd> <= length; j += 2 * width<Vd>) sums[0] += load(p + j), sums[1] += load(p + j + width<Vd>);
  for (; j + width<Vd> <= length; j += width<Vd>) sums[0] += load(p + j);
  if (j < length) sums[1] += load(p + j, static_cast<int>(length - j));
  return total(sums[0] + sums[1]);
}

// The sum of `length` floats, in double and in a fixed order.
inline double total(const float* p, int64_t length) {
  Vd low = {}, high = {};
  const auto add = [&](Vf v) __attribute__((always_inline)) {
    const Halves halves = widen(v);
    low += halves.low, high += halves.high;
  };
  int64_t j = 0;
  for (; j + width<Vf> <= length; j += width<Vf>) add(load(p + j));
  if (j < length) add(load(p + j, static_cast<int>(length - j)));
  return total(low + high);
}

// Sums of p and of p * q in double lanes. Short runs are summed in the element's own precision and folded in here.
template <class V> struct Sums;

template <> struct Sums<Vf> {
  Vd first[2] = {}, second[2] = {};

  BATCHNORM_INLINE void fold(Vf p, Vf pq) {
    const Halves a = widen(p), b = widen(pq);
    first[0] += a.low, first[1] += a.high;
    second[0] += b.low, second[1] += b.high;
  }
  double total_first() const { return total(first[0] + first[1]); }
  double total_second() const { return total(second[0] + second[1]); }
};

template <> struct Sums<Vd> {
  Vd first = {}, second = {};

  BATCHNORM_INLINE void fold(Vd p, Vd pq) { first += p, second += pq; }
  double total_first() const { return total(first); }
  double total_second() const { return total(second); }
};

template <> struct Sums<Pair> : Sums<Vf> {
  BATCHNORM_INLINE void fold(Pair p, Pair pq) { Sums<Vf>::fold(p.low + p.high, pq.low + pq.high); }
};

// Adds the terms of a vector of elements to the sums of p and of p * q.
template <class Pass, class T, class L>
BATCHNORM_INLINE void accumulate(const Pass& pass, const Row<T>& row, int64_t j, const typename Pass::Coefficients& k,
                                 L lanes, typename Pass::Sum& first, typename Pass::Sum& second) {
  if constexpr (Pass::is_dots) {
    pass.add(row, j, lanes, first, second);
  } else {
    typename Pass::V p, q;
    pass.terms(row, j, k, lanes, p, q);
    first += p, second = fma(p, q, second);
  }
}

// The same of `count` evenly spaced rows, column by column.
template <int count, class Pass, class T, class L>
BATCHNORM_INLINE void accumulate_rows(const Pass& pass, const Row<T>& row, const typename Row<T>::Step& step, int64_t j,
                                      const typename Pass::Coefficients& k, L lanes, typename Pass::V& first,
                                      typename Pass::V& second) {
  if constexpr (Pass::is_dots) {
    if constexpr (count == 1) pass.add(row, {}, j, lanes, first, second);
#pragma GCC unroll 8
    for (int r = 0; r + 1 < count; r += 2)
      pass.add(row.advanced(step, r), row.advanced(step, r + 1), j, lanes, first, second);
    first = in_order(first), second = in_order(second);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) accumulate(pass, row.advanced(step, r), j, k, lanes, first, second);
  }
}

// Additions to each lane before it is folded.
template <class Pass> BATCHNORM_INLINE int run_of(const Pass& pass) {
  if constexpr (!Pass::is_dots)
    if (pass.options.has_short_runs) return 1;
  return 16;
}

// The sums over `length` elements of a row of one channel.
template <class Pass, class T>
inline void reduce_row(const Pass pass, const Row<T> row, const typename Pass::Coefficients k, int64_t length,
                       Sums<typename Pass::Sum>& sums) {
  using V = typename Pass::Sum;
  constexpr int W = width<typename Pass::V>, unroll = 4 * vector_bytes / sizeof(V);
  // After 16 additions the rounding errors of a lane are less than a unit in the last place of the sum, unless the terms
  // are equal and the errors with them.
  const int64_t run_length = run_of(pass) * unroll * W;
  for (int64_t begin = 0; begin < length; begin += run_length) {
    const int64_t end = length - begin < run_length ? length : begin + run_length;
    V first[unroll] = {}, second[unroll] = {};
    int64_t j = begin;
    for (; j + unroll * W <= end; j += unroll * W)
      for (int u = 0; u < unroll; ++u) accumulate(pass, row, j + u * W, k, All{}, first[u], second[u]);
    for (; j + W <= end; j += W) accumulate(pass, row, j, k, All{}, first[0], second[0]);
    if (j < end) accumulate(pass, row, j, k, First{static_cast<int>(end - j)}, first[1], second[1]);
    if constexpr (unroll == 4)
      first[0] += first[2], first[1] += first[3], second[0] += second[2], second[1] += second[3];
    sums.fold(first[0] + first[1], second[0] + second[1]);
  }
}

// Adds the terms of `count` evenly spaced rows to the sums of the columns in [begin, end); sums[0] is that of `begin`.
template <int count, class Pass, class T>
inline void reduce_columns(const Pass pass, const Row<T> row, const typename Row<T>::Step step, int64_t begin,
                           int64_t end, ScalarOf<typename Pass::V>* first, ScalarOf<typename Pass::V>* second) {
  using V = typename Pass::V;
  constexpr int W = width<V>;
  const auto block = [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    const auto k = pass.template coefficients<by_column<V>>(j);
    const int64_t i = j - begin;
    V sum = {}, product = {};
    accumulate_rows<count>(pass, row, step, j, k, lanes, sum, product);
    store(first + i, load_as<V>(first + i) + sum);
    store(second + i, load_as<V>(second + i) + product);
  };
  int64_t j = begin;
  for (; j + W <= end; j += W) block(j, All{});
  if (j < end) block(j, First{static_cast<int>(end - j)});
}

// Whether all that a row writes can be streamed, whole vectors at a time, from its element j on.
template <class T> inline bool is_aligned(const Row<T>& row, int64_t j) {
  constexpr uintptr_t bytes = width<typename Compute<T>::V> * sizeof(T);
  const auto at = [&](const T* p) { return p ? reinterpret_cast<uintptr_t>(p + j) % bytes : 0; };
  return at(row.out) == 0 && at(row.dresidual) == 0;
}

// Stores the results for `length` elements of a row of one channel.
template <class Pass, class T>
inline void map_row(const Pass pass, const Row<T> row, const typename Pass::Coefficients k, int64_t length,
                    bool is_streaming) {
  constexpr int W = width<typename Pass::V>;
  int64_t j = 0;
  if (is_streaming) {
    const T* out = row.out ? row.out : row.dresidual;
    const int head = static_cast<int>((W - reinterpret_cast<uintptr_t>(out) / sizeof(T) % W) % W);
    if (head < length && is_aligned(row, head)) {
      if (head) pass.apply(row, 0, k, First{head}, false);
      for (j = head; j + W <= length; j += W) pass.apply(row, j, k, All{}, true);
    }
  }
  for (; j + W <= length; j += W) pass.apply(row, j, k, All{}, false);
  if (j < length) pass.apply(row, j, k, First{static_cast<int>(length - j)}, false);
}

// Stores the results of `count` evenly spaced rows for the columns in [begin, end).
template <int count, class Pass, class T>
inline void map_columns(const Pass pass, const Row<T> row, const typename Row<T>::Step step, int64_t begin, int64_t end,
                        bool is_streaming) {
  using V = typename Pass::V;
  constexpr int W = width<V>;
  for (int r = 0; r < count; ++r) is_streaming = is_streaming && is_aligned(row.advanced(step, r), begin);
  const auto block = [&](int64_t j, auto lanes, bool streams) __attribute__((always_inline)) {
    const auto k = pass.template coefficients<by_column<V>>(j);
    for (int r = 0; r < count; ++r) pass.apply(row.advanced(step, r), j, k, lanes, streams);
  };
  int64_t j = begin;
  if (is_streaming)
    for (; j + W <= end; j += W) block(j, All{}, true);
  for (; j + W <= end; j += W) block(j, All{}, false);
  if (j < end) block(j, First{static_cast<int>(end - j)}, false);
}

}  // namespace batchnorm::BATCHNORM_ISA
