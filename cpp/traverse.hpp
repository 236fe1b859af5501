// Traversal of rows by a pass (see elements.hpp): reductions, whose sums end up in doubles, and maps, which store
// results.
#pragma once

#include "elements.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Sum of `length` doubles, in a fixed order.
inline double sum_of(const double* p, int64_t length) {
  VecF64 sums[2] = {};
  int64_t j = 0;
  for (; j + 2 * width<VecF64> <= length; j += 2 * width<VecF64>)
    sums[0] += load(p + j), sums[1] += load(p + j + width<VecF64>);
  for (; j + width<VecF64> <= length; j += width<VecF64>) sums[0] += load(p + j);
  if (j < length) sums[1] += load(p + j, static_cast<int>(length - j));
  return sum_lanes(sums[0] + sums[1]);
}

// Sum of `length` floats, in double and in a fixed order.
inline double sum_of(const float* p, int64_t length) {
  VecF64 low = {}, high = {};
  const auto add = [&](VecF32 v) __attribute__((always_inline)) {
    const Halves halves = widen(v);
    low += halves.low, high += halves.high;
  };
  int64_t j = 0;
  for (; j + width<VecF32> <= length; j += width<VecF32>) add(load(p + j));
  if (j < length) add(load(p + j, static_cast<int>(length - j)));
  return sum_lanes(low + high);
}

// Sums of p and of p * q in lanes of doubles. A few terms are first summed in the precision of the elements; `fold`
// then adds these partial sums.
template <class V> struct Sums;

template <> struct Sums<VecF32> {
  VecF64 sum_p[2] = {}, sum_pq[2] = {};

  BATCHNORM_INLINE void fold(VecF32 p, VecF32 pq) {
    const Halves a = widen(p), b = widen(pq);
    sum_p[0] += a.low, sum_p[1] += a.high;
    sum_pq[0] += b.low, sum_pq[1] += b.high;
  }
  double total_p() const { return sum_lanes(sum_p[0] + sum_p[1]); }
  double total_pq() const { return sum_lanes(sum_pq[0] + sum_pq[1]); }
};

template <> struct Sums<VecF64> {
  VecF64 sum_p = {}, sum_pq = {};

  BATCHNORM_INLINE void fold(VecF64 p, VecF64 pq) { sum_p += p, sum_pq += pq; }
  double total_p() const { return sum_lanes(sum_p); }
  double total_pq() const { return sum_lanes(sum_pq); }
};

template <> struct Sums<Pair> : Sums<VecF32> {
  BATCHNORM_INLINE void fold(Pair p, Pair pq) { Sums<VecF32>::fold(p.low + p.high, pq.low + pq.high); }
};

// Adds the terms of one vector of elements to the sums of p and of p * q.
template <class Pass, class T, class L>
BATCHNORM_INLINE void accumulate(const Pass& pass, const Row<T>& row, int64_t j, const typename Pass::Coefficients& k,
                                 L lanes, typename Pass::Sum& sum_p, typename Pass::Sum& sum_pq) {
  if constexpr (Pass::is_dot) {
    pass.add(row, j, lanes, sum_p, sum_pq);
  } else {
    typename Pass::V p, q;
    pass.terms(row, j, k, lanes, p, q);
    sum_p += p, sum_pq = fma(p, q, sum_pq);
  }
}

// Adds the terms of `rows` evenly spaced rows to the sums of p and of p * q, column by column.
template <int rows, class Pass, class T, class L>
BATCHNORM_INLINE void accumulate_rows(const Pass& pass, const Row<T>& row, const typename Row<T>::Step& step, int64_t j,
                                      const typename Pass::Coefficients& k, L lanes, typename Pass::V& sum_p,
                                      typename Pass::V& sum_pq) {
  if constexpr (Pass::is_dot) {
    if constexpr (rows == 1) pass.add(row, {}, j, lanes, sum_p, sum_pq);
#pragma GCC unroll 8
    for (int r = 0; r + 1 < rows; r += 2)
      pass.add(row.offset_by(step, r), row.offset_by(step, r + 1), j, lanes, sum_p, sum_pq);
    sum_p = deinterleave(sum_p), sum_pq = deinterleave(sum_pq);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) accumulate(pass, row.offset_by(step, r), j, k, lanes, sum_p, sum_pq);
  }
}

// Number of additions to each lane before it is folded.
template <class Pass> BATCHNORM_INLINE int additions_per_fold(const Pass& pass) {
  if constexpr (!Pass::is_dot)
    if (pass.options.has_frequent_folds) return 1;
  return 16;
}

// Sums over `length` elements of a row of one channel.
template <class Pass, class T>
inline void reduce_row(const Pass pass, const Row<T> row, const typename Pass::Coefficients k, int64_t length,
                       Sums<typename Pass::Sum>& sums) {
  using V = typename Pass::Sum;
  constexpr int W = width<typename Pass::V>, unroll = 4 * vector_bytes / sizeof(V);
  // After 16 additions the rounding error of a lane is less than a unit in the last place of the sum, unless the terms,
  // and with them their errors, are equal.
  const int64_t additions = additions_per_fold(pass) * unroll * W;
  for (int64_t begin = 0; begin < length; begin += additions) {
    const int64_t end = length - begin < additions ? length : begin + additions;
    V sum_p[unroll] = {}, sum_pq[unroll] = {};
    int64_t j = begin;
    for (; j + unroll * W <= end; j += unroll * W)
      for (int u = 0; u < unroll; ++u) accumulate(pass, row, j + u * W, k, FullVector{}, sum_p[u], sum_pq[u]);
    for (; j + W <= end; j += W) accumulate(pass, row, j, k, FullVector{}, sum_p[0], sum_pq[0]);
    if (j < end) accumulate(pass, row, j, k, PartialVector{static_cast<int>(end - j)}, sum_p[1], sum_pq[1]);
    if constexpr (unroll == 4)
      sum_p[0] += sum_p[2], sum_p[1] += sum_p[3], sum_pq[0] += sum_pq[2], sum_pq[1] += sum_pq[3];
    sums.fold(sum_p[0] + sum_p[1], sum_pq[0] + sum_pq[1]);
  }
}

// Adds the terms of `rows` evenly spaced rows to the sums of the columns in [begin, end). sums_p[0] and sums_pq[0]
// belong to column `begin`.
template <int rows, class Pass, class T>
inline void reduce_columns(const Pass pass, const Row<T> row, const typename Row<T>::Step step, int64_t begin,
                           int64_t end, ScalarOf<typename Pass::V>* sums_p, ScalarOf<typename Pass::V>* sums_pq) {
  using V = typename Pass::V;
  constexpr int W = width<V>;
  const auto block = [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    const auto k = pass.template coefficients<load_column<V>>(j);
    const int64_t i = j - begin;
    V sum_p = {}, sum_pq = {};
    accumulate_rows<rows>(pass, row, step, j, k, lanes, sum_p, sum_pq);
    store(sums_p + i, load_as<V>(sums_p + i) + sum_p);
    store(sums_pq + i, load_as<V>(sums_pq + i) + sum_pq);
  };
  int64_t j = begin;
  for (; j + W <= end; j += W) block(j, FullVector{});
  if (j < end) block(j, PartialVector{static_cast<int>(end - j)});
}

// The elements of a cache line, and the vectors that fill it. A line's vectors are stored one after the other: where
// results are streamed, a line that is left half written is written to memory twice; where they are not, it may leave
// the first-level cache in between, because rows that are a multiple of 4 KB apart share few of its lines.
template <class T> constexpr int line_elements = static_cast<int>(cache_line_bytes / sizeof(T));
template <class T> constexpr int line_vectors = line_elements<T> / width<typename Compute<T>::V>;

// True if all outputs of a row can be streamed in whole cache lines from element j on.
template <class T> inline bool is_aligned(const Row<T>& row, int64_t j) {
  const auto at = [&](const T* p) { return p ? reinterpret_cast<uintptr_t>(p + j) % cache_line_bytes : 0; };
  return at(row.out) == 0 && at(row.dresidual) == 0;
}

// Stores the results for `length` elements of a row of one channel.
template <class Pass, class T>
inline void map_row(const Pass pass, const Row<T> row, const typename Pass::Coefficients k, int64_t length,
                    bool is_streaming) {
  constexpr int W = width<typename Pass::V>, line = line_elements<T>;
  int64_t j = 0;
  if (is_streaming) {
    const T* out = row.out ? row.out : row.dresidual;
    const int64_t head = (line - reinterpret_cast<uintptr_t>(out) / sizeof(T) % line) % line;
    if (head + line <= length && is_aligned(row, head)) {
      for (; j + W <= head; j += W) pass.apply(row, j, k, FullVector{}, false);
      if (j < head) pass.apply(row, j, k, PartialVector{static_cast<int>(head - j)}, false);
      for (j = head; j + line <= length; j += line)
#pragma GCC unroll 4
        for (int v = 0; v < line_vectors<T>; ++v) pass.apply(row, j + v * W, k, FullVector{}, true);
    }
  }
  for (; j + W <= length; j += W) pass.apply(row, j, k, FullVector{}, false);
  if (j < length) pass.apply(row, j, k, PartialVector{static_cast<int>(length - j)}, false);
}

// Stores the results of `rows` evenly spaced rows for the columns in [begin, end).
template <int rows, class Pass, class T>
inline void map_columns(const Pass pass, const Row<T> row, const typename Row<T>::Step step, int64_t begin,
                        int64_t end) {
  using V = typename Pass::V;
  constexpr int W = width<V>, line = line_elements<T>;
  int64_t j = begin;
  for (; j + line <= end; j += line) {
    typename Pass::Coefficients k[line_vectors<T>];
#pragma GCC unroll 4
    for (int v = 0; v < line_vectors<T>; ++v) k[v] = pass.template coefficients<load_column<V>>(j + v * W);
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < line_vectors<T>; ++v)
        pass.apply(row.offset_by(step, r), j + v * W, k[v], FullVector{}, false);
  }
  const auto map_vector = [&](auto lanes) __attribute__((always_inline)) {
    const auto k = pass.template coefficients<load_column<V>>(j);
    for (int r = 0; r < rows; ++r) pass.apply(row.offset_by(step, r), j, k, lanes, false);
  };
  for (; j + W <= end; j += W) map_vector(FullVector{});
  if (j < end) map_vector(PartialVector{static_cast<int>(end - j)});
}

// `map_columns` with streaming stores: some cache lines of a row, then those of the next row. Reads in several streams are
// faster than in one. Where a line takes several stores, single lines to several rows in turn may take four times as
// long as several lines.
template <int rows, int lines, class Pass, class T>
inline void stream_columns(const Pass pass, const Row<T> row, const typename Row<T>::Step step, int64_t begin,
                           int64_t end) {
  using V = typename Pass::V;
  constexpr int W = width<V>, run = lines * line_elements<T>;
  bool is_streaming = true;
  for (int r = 0; r < rows; ++r) is_streaming = is_streaming && is_aligned(row.offset_by(step, r), begin);
  int64_t j = begin;
  for (; is_streaming && j + run <= end; j += run)
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < run; i += W)
        pass.apply(row.offset_by(step, r), j + i, pass.template coefficients<load_column<V>>(j + i), FullVector{},
                   true);
  map_columns<rows>(pass, row, step, j, end);
}

}  // namespace batchnorm::BATCHNORM_ISA
