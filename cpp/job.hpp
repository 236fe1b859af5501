// A problem cut into tiles, with its workspace: what forward and backward have in common.
#pragma once

#include <cassert>

#include "geometry.hpp"

namespace batchnorm::BATCHNORM_ISA {

// One channel's number from an array of any element type, and into it.
inline double read(const Channels& channels, int64_t c, double absent) {
  if (!channels.data) return absent;
  const int64_t i = c * channels.stride;
  switch (channels.dtype) {
    case Dtype::float64: return scalar(static_cast<const double*>(channels.data) + i);
    case Dtype::float32: return scalar(static_cast<const float*>(channels.data) + i);
    case Dtype::bfloat16: return scalar(static_cast<const bfloat16*>(channels.data) + i);
    default: return scalar(static_cast<const float16*>(channels.data) + i);
  }
}

inline void write(const Channels& channels, int64_t c, double value) {
  if (!channels.data) return;
  const int64_t i = c * channels.stride;
  const float narrow = static_cast<float>(value);
  switch (channels.dtype) {
    case Dtype::float64: return store(static_cast<double*>(channels.data) + i, broadcast<Vd>(value), 1);
    case Dtype::float32: return store(static_cast<float*>(channels.data) + i, broadcast<Vf>(narrow), 1);
    case Dtype::bfloat16: return store(static_cast<bfloat16*>(channels.data) + i, broadcast<Pair>(narrow), 1);
    default: return store(static_cast<float16*>(channels.data) + i, broadcast<Pair>(narrow), 1);
  }
}

// Every NaN as one of them. Which of two NaN a sum or a product passes on is the compiler's choice wherever the formula
// is compiled, and one thread runs other copies of it than several: what is stored for a channel has to be told apart by
// no more than being NaN.
inline double with_one_nan(double value) { return value == value ? value : __builtin_nan(""); }

// For the functions that store elements: compiled once for each pass, so that it is the same instructions that choose
// among an element's NaN for any number of threads.
#ifdef __clang__
#define BATCHNORM_COMPILED_ONCE __attribute__((noinline))
#else
#define BATCHNORM_COMPILED_ONCE __attribute__((noinline, noclone))
#endif

template <class T> class Job : public Geometry<T> {
 public:
  using Base = Geometry<T>;
  using typename Base::F;
  using typename Base::Range;
  using typename Base::Scope;
  using typename Base::V;
  using Base::problem, Base::plan, Base::options;

  Job(const Problem& problem, const Plan& plan, void* workspace)
      : Geometry<T>(problem, plan), free_(static_cast<char*>(workspace)), end_(free_ + plan.workspace) {
    first_ = take<double>(plan.chunks * problem.C);
    second_ = take<double>(plan.chunks * problem.C);
    tables = take_tables(problem.C);
    again = take<uint8_t>(problem.C);
  }

  Tables<F> tables;  // by channel
  uint8_t* again;    // channels that have to be measured once more

  // Calls body(scope) so that all channels are done. A channel's second pass finds it in the core's cache if one thread
  // does both, so each takes a few channels at a time, unless there are too few of them to go round. They start out of
  // step, so that one reads while the other waits for its stores, and take fewer and fewer, so that they end together.
  template <class Body> void run(bool has_reduction, const Body& body) {
    const int64_t C = problem.C, apart = plan.channels_apart;
    const int64_t unit = plan.family == Family::short_rows ? plan.block / problem.S : 1;
    if (!apart || (!has_reduction && plan.family == Family::rows)) {
      const Tables<F> columns = take_tables(plan.table_length);
      return parallel(problem.threads, problem.helpers, [&](Team& team) { body(Scope{{0, C}, team, columns}); });
    }
    int64_t next = 0;
    Tables<F>* const columns = take<Tables<F>>(problem.threads);
    for (int i = 0; i < problem.threads; ++i) columns[i] = take_tables(plan.table_length);
    parallel(problem.threads, problem.helpers, [&](Team& team) {
      Team alone;
      int64_t most = unit * max(1, apart / unit * (team.rank + 1) / team.size);
      for (;; most = apart) {
        int64_t begin = __atomic_load_n(&next, __ATOMIC_RELAXED), taken;
        do {
          if (begin >= C) return;
          taken = min(most, unit * max(1, (C - begin) / unit / (2 * team.size)));
        } while (!__atomic_compare_exchange_n(&next, &begin, begin + taken, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        body(Scope{{begin, min(C, begin + taken)}, alone, columns[team.rank]});
      }
    });
  }

  // The sums of `pass` over each chunk.
  template <class Pass> void reduce(const Scope& scope, Pass pass) const {
    spread(scope, reads<Pass>());
    pass.tables = tables_of(scope);
    for_tiles(scope, plan.chunks, false, [&](int64_t k, Range block) {
      plan.family == Family::rows ? reduce_rows(pass, k, block) : reduce_columns_of(scope, pass, k, block);
    });
  }

  // The results of `pass`, and of its padding (or zeros) where nothing counts.
  template <class Pass> void map(const Scope& scope, Pass pass) const {
    spread(scope, reads<Pass>());
    pass.tables = tables_of(scope);
    if (plan.family == Family::rows)
      for_tiles(scope, problem.N * plan.chunks_per_row, true,
                [&](int64_t part, Range block) { map_rows(pass, part, block); });
    else for_tiles(scope, plan.chunks, true, [&](int64_t k, Range block) { map_columns_of(scope, pass, k, block); });
  }

  // A step of a scope's team: body(range) for parts of its channels.
  template <class Body> static void for_channels(const Scope& scope, const Body& body) {
    constexpr int64_t least = 64;
    scope.team.share(scope.channels.begin, scope.channels.end, least, body);
  }

  // Channels that are finished side by side, in vectors: the divisions and roots of one by itself take longer than the
  // sums of its elements where these are a few dozen.
  static constexpr int together = 8;

  bool can_dot() const { return has_dots<T> && !options.has_mask; }  // whether `Dots` can take the sums

  // ---- channels ----

  // Adds up the chunks of these channels, in a fixed order; their first ones then hold the total. Once after `reduce`.
  void combine(Range channels) const {
    if (plan.family == Family::columns) {
      for (int64_t k = 1; k < plan.chunks; ++k)
        for (int64_t c = channels.begin, i = k * problem.C + c; c < channels.end; ++c, ++i)
          first_[c] += first_[i], second_[c] += second_[i];
      return;
    }
    for (int64_t c = channels.begin; c < channels.end; ++c)
      for (int64_t i = c * plan.chunks, k = i + 1; k < i + plan.chunks; ++k)
        first_[i] += first_[k], second_[i] += second_[k];
  }

  void total_of(int64_t c, double& first, double& second) const {
    const int64_t i = plan.family == Family::columns || plan.chunks == 0 ? c : c * plan.chunks;
    first = plan.chunks ? first_[i] : 0;
    second = plan.chunks ? second_[i] : 0;
  }

  // The coefficients of z, from statistics and parameters.
  void fill_tables(int64_t c) const {
    const auto statistic = [c](const void* table) { return static_cast<double>(element_at<F>(table, c)); };
    fill_tables(c, statistic(problem.mean), statistic(problem.mean_lo), statistic(problem.rstd));
  }
  void fill_tables(int64_t c, double mean, double mean_lo, double rstd) const {
    const double scale = read(problem.gamma, c, 1) * rstd, beta = read(problem.beta, c, 0);
    tables.hi[c] = static_cast<F>(with_one_nan(mean));
    tables.scale[c] = static_cast<F>(with_one_nan(scale));
    tables.beta[c] = static_cast<F>(with_one_nan(beta));
    // An infinite scale, of running statistics without a deviation, takes nothing from a mean that is exact.
    tables.offset[c] = static_cast<F>(with_one_nan(mean_lo == 0 ? beta : beta - scale * mean_lo));
  }

 protected:
  using Base::row;

  // The pass over the padding beside `pass`.
  template <class Pass> static typename Pass::Padding padding_of(const Pass& pass, const Tables<F>& tables) {
    typename Pass::Padding padding{};
    padding.tables = tables;
    padding.options = pass.options;
    padding.options.is_padding = true;
    return padding;
  }

 private:
  using Base::element_, Base::step_, Base::kept;

  template <class Pass> static constexpr bool has_padding = !__is_same(typename Pass::Padding, void);

  // The coefficients of a pass and of its padding.
  template <class Pass> unsigned reads() const {
    if constexpr (has_padding<Pass>)
      if (options.normalized_padding) return Pass::reads | Pass::Padding::reads;
    return Pass::reads;
  }

  // ---- workspace ----

  // As `make_plan` counts them.
  template <class P> P* take(int64_t length) {
    char* const begin = free_ + -reinterpret_cast<uintptr_t>(free_) % line_bytes;
    free_ = begin + length * sizeof(P);
    assert(free_ <= end_);
    return reinterpret_cast<P*>(begin);
  }
  Tables<F> take_tables(int64_t length) {
    static_assert(sizeof(Tables<F>) == coefficient_tables * sizeof(F*) && width<Pair> <= table_excess);
    const auto table = [&] { return take<F>(length + table_excess); };
    return {table(), table(), table(), table(), table(), table(), table()};
  }

  const Tables<F>& tables_of(const Scope& scope) const { return plan.family == Family::rows ? tables : scope.columns; }

  // Copies the coefficients of the channels, those that `wanted` names, to their columns.
  void spread(const Scope& scope, unsigned wanted) const {
    if (plan.family == Family::rows) return;
    using Vector = typename Compute<F>::V;
    const Tables<F>& columns = scope.columns;
    struct Copy {
      unsigned table;
      const F* from;
      F* to;
    };
    const Copy copies[] = {{HI, tables.hi, columns.hi},
                           {SCALE, tables.scale, columns.scale},
                           {OFFSET, tables.offset, columns.offset},
                           {BETA, tables.beta, columns.beta},
                           {A, tables.a, columns.a},
                           {B, tables.b, columns.b},
                           {C, tables.c, columns.c}};
    const auto for_tables = [&](const auto& body) {
      for (const auto& copy : copies)
        if (wanted & copy.table) body(copy.from, copy.to);
    };
    if (plan.family == Family::columns)
      return scope.team.share(0, plan.width / problem.C, 1, [&](Range sides) {
        for_tables([&](const F* from, F* to) {
          for (int64_t side = sides.begin; side < sides.end; ++side)
            for (int64_t c = 0; c < problem.C; ++c) to[side * problem.C + c] = from[c];
        });
      });
    for_channels(scope, [&](Range mine) {
      // Whole vectors, whose excess the next channel overwrites, but for the last ones of this part.
      const int64_t end = (mine.end - scope.channels.begin) * problem.S;
      for_tables([&](const F* from, F* to) {
        for (int64_t c = mine.begin; c < mine.end; ++c) {
          const int64_t begin = (c - scope.channels.begin) * problem.S;
          for (int64_t j = begin; j < begin + problem.S; j += width<Vector>) {
            const auto value = broadcast<Vector>(from[c]);
            if (j + width<Vector> <= end) store(to + j, value);
            else store(to + j, value, static_cast<int>(end - j));
          }
        }
      });
    });
  }

  // ---- tiles ----

  // What a scope's tiles are blocks of: its channels, or its columns, counted from its own first.
  Range across(const Scope& scope) const {
    if (plan.family == Family::rows) return scope.channels;
    if (plan.family == Family::columns) return {0, plan.width};
    return {0, (scope.channels.end - scope.channels.begin) * problem.S};
  }

  // A step of the scope's team: body(i, block) for [0, count) x the blocks of `across`. A map takes them from the end,
  // whose elements the reduction has read last.
  template <class Body> void for_tiles(const Scope& scope, int64_t count, bool is_map, const Body& body) const {
    const Range all = across(scope);
    const int64_t blocks = (all.end - all.begin + plan.block - 1) / plan.block, tiles = blocks * count;
    scope.team.share(0, tiles, 1, [&](Range mine) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t tile = is_map ? tiles - 1 - i : i, begin = all.begin + tile % blocks * plan.block;
        body(tile / blocks, Range{begin, min(all.end, begin + plan.block)});
      }
      if (is_map && plan.is_streaming) fence();
    });
  }

  // ---- tiles of rows: those next to each other in memory one after the other, the channels of one n first ----

  template <class Pass> void reduce_rows(const Pass& pass, int64_t k, Range channels) const {
    Sums<typename Pass::Sum> sums[row_block];
    const int64_t s = k % plan.chunks_per_row * plan.chunk_s, end = min(problem.S, s + plan.chunk_s);
    const int64_t n = k / plan.chunks_per_row * plan.chunk_n;
    for (int64_t i = n; i < min(problem.N, n + plan.chunk_n); ++i)
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t counting = max(0, min(kept(i, c), end) - s), rest = end - s - counting;
        const Row<T> here = row(i, c, s);
        Sums<typename Pass::Sum>& sum = sums[c - channels.begin];
        if (counting) reduce_row(pass, here, pass.template coefficients<by_channel<V>>(c), counting, sum);
        if constexpr (has_padding<Pass>)
          if (rest && options.normalized_padding) {
            const auto padding = padding_of(pass, pass.tables);
            reduce_row(padding, here.advanced(element_, counting), padding.template coefficients<by_channel<V>>(c),
                       rest, sum);
          }
      }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      first_[c * plan.chunks + k] = sums[c - channels.begin].total_first();
      second_[c * plan.chunks + k] = sums[c - channels.begin].total_second();
    }
  }

  template <class Pass> BATCHNORM_COMPILED_ONCE void map_rows(const Pass& pass, int64_t part, Range channels) const {
    const int64_t n = part / plan.chunks_per_row, s = part % plan.chunks_per_row * plan.chunk_s;
    const int64_t end = min(problem.S, s + plan.chunk_s);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t counting = max(0, min(kept(n, c), end) - s), rest = end - s - counting;
      const Row<T> here = row(n, c, s), beyond = here.advanced(element_, counting);
      if (counting) map_row(pass, here, pass.template coefficients<by_channel<V>>(c), counting, plan.is_streaming);
      if (rest)
        pad(pass, beyond, rest, [&](const auto& padding) {
          map_row(padding, beyond, padding.template coefficients<by_channel<V>>(c), rest, false);
        });
    }
  }

  // ---- tiles of columns ----

  // Rows that are walked at a time: some 16 streams. The processor recognises as many where each goes on for a page;
  // shorter rows are read faster one after the other, as they lie (twice as fast from memory at 256 columns).
  template <class Pass> static constexpr int group = Pass::arrays <= 2 ? 8 : 4;

  template <class Pass> void reduce_columns_of(const Scope& scope, const Pass& pass, int64_t k, Range columns) const {
    constexpr int64_t widest = widest_block + width<Pair>;
    const int longest_run = 4 * run_of(pass);  // rows that are summed in the element's own precision
    const int64_t width = columns.end - columns.begin;
    alignas(64) F runs[2][widest];
    alignas(64) double sums[2][widest];
    // Of short rows the columns of a channel are added up at once, of others those side by side.
    const bool is_short = plan.family == Family::short_rows;
    const int64_t own = is_short ? width / problem.S : min(width, problem.C);
    for (int i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < width; ++j) runs[i][j] = 0;
      for (int64_t j = 0; j < own; ++j) sums[i][j] = 0;
    }
    const auto fold = [&] {
      for (int i = 0; i < 2; ++i) {
        if (is_short)
          for (int64_t c = 0; c < own; ++c) sums[i][c] += total(runs[i] + c * problem.S, problem.S);
        else
          for (int64_t side = 0; side < width; side += own)
            for (int64_t j = 0; j < own; ++j) sums[i][j] += runs[i][side + j];
        for (int64_t j = 0; j < width; ++j) runs[i][j] = 0;
      }
    };
    int run = 0;
    this->for_runs(scope, k, [&](Row<T> row, int64_t rows, int64_t length, bool is_kept) {
      const int64_t end = min(columns.end, length);
      if (end <= columns.begin) return;
      const auto take = [&](const auto& taking) {
        while (rows) {
          const int taken = plan.has_groups && rows >= group<Pass> ? group<Pass> : 1;
          if (taken > 1) reduce_columns<group<Pass>>(taking, row, step_, columns.begin, end, runs[0], runs[1]);
          else reduce_columns<1>(taking, row, step_, columns.begin, end, runs[0], runs[1]);
          row = row.advanced(step_, taken);
          rows -= taken;
          if ((run += taken) >= longest_run) fold(), run = 0;
        }
      };
      if (is_kept) return take(pass);
      if constexpr (has_padding<Pass>)
        if (options.normalized_padding) take(padding_of(pass, pass.tables));
    });
    if (run) fold();
    const int64_t first_channel = is_short ? scope.channels.begin + columns.begin / problem.S : columns.begin;
    const int64_t stride = is_short ? plan.chunks : 1;
    const int64_t begin = is_short ? first_channel * plan.chunks + k : k * problem.C + first_channel;
    for (int64_t j = 0; j < own; ++j) first_[begin + j * stride] = sums[0][j], second_[begin + j * stride] = sums[1][j];
  }

  template <class Pass>
  BATCHNORM_COMPILED_ONCE void map_columns_of(const Scope& scope, const Pass& pass, int64_t k, Range columns) const {
    this->for_runs(scope, k, [&](Row<T> row, int64_t rows, int64_t length, bool is_kept) {
      const int64_t begin = columns.begin, end = min(columns.end, length);
      if (end <= begin) return;
      for (; is_kept && plan.has_groups && rows >= group<Pass>;
           rows -= group<Pass>, row = row.advanced(step_, group<Pass>))
        map_columns<group<Pass>>(pass, row, step_, begin, end, plan.is_streaming);
      for (; rows; --rows, row = row.advanced(step_, 1)) {
        if (is_kept) map_columns<1>(pass, row, step_, begin, end, plan.is_streaming);
        else
          pad(pass, row.advanced(element_, begin), end - begin,
              [&](const auto& padding) { map_columns<1>(padding, row, step_, begin, end, false); });
      }
    });
  }

  // What comes out where no element of (a part of) a row counts: zeros, or what `normalize(padding)` stores.
  template <class Pass, class Normalize>
  void pad(const Pass& pass, const Row<T>& row, int64_t length, const Normalize& normalize) const {
    if constexpr (has_padding<Pass>)
      if (options.normalized_padding) return normalize(padding_of(pass, pass.tables));
    if (row.out) __builtin_memset(row.out, 0, length * sizeof(T));
    if (row.dresidual) __builtin_memset(row.dresidual, 0, length * sizeof(T));
  }

  char* free_;                        // what is left of the workspace, up to
  [[maybe_unused]] const char* end_;  // where it ends
  double *first_, *second_;           // the sums of each chunk: [C][chunks], or, for columns, [chunks][C]
};

}  // namespace batchnorm::BATCHNORM_ISA
