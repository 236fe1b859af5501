// The tiles of a problem, its workspace and its coefficients: the common base of the forward and the backward pass.
#pragma once

#include <cassert>

#include "channels.hpp"
#include "row_layout.hpp"

namespace batchnorm::BATCHNORM_ISA {

// For functions that store elements. They are compiled once for each pass, so that the same instructions choose among
// the NaN of an element for any number of threads.
#ifdef __clang__
#define BATCHNORM_NOCLONE __attribute__((noinline))
#else
#define BATCHNORM_NOCLONE __attribute__((noinline, noclone))
#endif

template <class T> class Driver : public RowLayout<T> {
 public:
  using Base = RowLayout<T>;
  using typename Base::F;
  using typename Base::Range;
  using typename Base::ChannelSlice;
  using typename Base::V;
  using Base::problem, Base::plan, Base::options;

  Driver(const Problem& problem, const Plan& plan, void* workspace)
      : RowLayout<T>(problem, plan), free_(static_cast<char*>(workspace)), end_(free_ + plan.workspace_bytes) {
    sum_p_ = allocate<double>(plan.chunks * problem.C);
    sum_pq_ = allocate<double>(plan.chunks * problem.C);
    tables = allocate_tables(problem.C);
    needs_recompute = allocate<uint8_t>(problem.C);
  }

  Tables<F> tables;          // by channel
  uint8_t* needs_recompute;  // channels whose moments have to be computed again

  // Calls body(slice) for slices that cover all channels. Where possible, each thread takes a few channels at a time
  // and does both passes over them, so that the second pass finds them in the cache of its core. Threads start with
  // slices of different sizes, so that one reads while another waits for its stores, and take smaller slices towards
  // the end, so that they finish together.
  template <class Body> void for_slices(bool has_reduction, const Body& body) {
    const int64_t C = problem.C, per_task = plan.channels_per_task;
    const int64_t unit = plan.family == Family::short_rows ? plan.block / problem.S : 1;
    if (!per_task || (!has_reduction && plan.family == Family::rows)) {
      const Tables<F> columns = allocate_tables(plan.table_length);
      return run_team(problem.threads, problem.pool, [&](Team& team) { body(ChannelSlice{{0, C}, team, columns}); });
    }
    int64_t next = 0;
    Tables<F>* const columns = allocate<Tables<F>>(problem.threads);
    for (int i = 0; i < problem.threads; ++i) columns[i] = allocate_tables(plan.table_length);
    run_team(problem.threads, problem.pool, [&](Team& team) {
      Team single;
      int64_t max_claimed = unit * max(1, per_task / unit * (team.rank + 1) / team.size);
      for (;; max_claimed = per_task) {
        int64_t begin = __atomic_load_n(&next, __ATOMIC_RELAXED), claimed;
        do {
          if (begin >= C) return;
          claimed = min(max_claimed, unit * max(1, (C - begin) / unit / (2 * team.size)));
        } while (
            !__atomic_compare_exchange_n(&next, &begin, begin + claimed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        body(ChannelSlice{{begin, min(C, begin + claimed)}, single, columns[team.rank]});
      }
    });
  }

  // Computes the sums of `pass` over each chunk of the slice's channels.
  template <class Pass> void reduce(const ChannelSlice& slice, Pass pass) const {
    fill_column_tables(slice, tables_used_by<Pass>());
    pass.tables = tables_for(slice);
    for_tiles(slice, plan.chunks, false, [&](int64_t k, Range block) {
      plan.family == Family::rows ? reduce_row_tile(pass, k, block) : reduce_column_tile(slice, pass, k, block);
    });
  }

  // Stores the results of `pass`; for padding, those of its pass over padding, or zeros.
  template <class Pass> void map(const ChannelSlice& slice, Pass pass) const {
    fill_column_tables(slice, tables_used_by<Pass>());
    pass.tables = tables_for(slice);
    if (plan.family == Family::rows)
      for_tiles(slice, problem.N * plan.chunks_per_row, true,
                [&](int64_t part, Range block) { map_row_tile(pass, part, block); });
    else for_tiles(slice, plan.chunks, true, [&](int64_t k, Range block) { map_column_tile(slice, pass, k, block); });
  }

  // One step of the slice's team: calls body(range) for ranges of the slice's channels.
  template <class Body> static void for_channels(const ChannelSlice& slice, const Body& body) {
    constexpr int64_t min_piece = 64;
    slice.team.parallel_for(slice.channels.begin, slice.channels.end, min_piece, body);
  }

  // Channels whose moments are finished together, in vectors. One channel at a time, divisions and square roots would
  // take longer than the sums of a few dozen elements.
  static constexpr int channels_at_once = 8;

  bool can_use_dot() const { return has_dot<T> && !options.has_mask; }  // true if `DotTerms` can compute the sums

  // ---- channels ----

  // Adds up the chunks of these channels, in a fixed order; the total is then in the place of the first chunk. Called
  // once after `reduce`.
  void combine_chunks(Range channels) const {
    if (plan.family == Family::columns) {
      for (int64_t k = 1; k < plan.chunks; ++k)
        for (int64_t c = channels.begin, i = k * problem.C + c; c < channels.end; ++c, ++i)
          sum_p_[c] += sum_p_[i], sum_pq_[c] += sum_pq_[i];
      return;
    }
    for (int64_t c = channels.begin; c < channels.end; ++c)
      for (int64_t i = c * plan.chunks, k = i + 1; k < i + plan.chunks; ++k)
        sum_p_[i] += sum_p_[k], sum_pq_[i] += sum_pq_[k];
  }

  void totals_of(int64_t c, double& sum_p, double& sum_pq) const {
    const int64_t i = plan.family == Family::columns || plan.chunks == 0 ? c : c * plan.chunks;
    sum_p = plan.chunks ? sum_p_[i] : 0;
    sum_pq = plan.chunks ? sum_pq_[i] : 0;
  }

  // Computes the coefficients of z from statistics and parameters.
  void fill_tables(int64_t c) const {
    const auto statistic = [c](const void* table) { return static_cast<double>(element_at<F>(table, c)); };
    fill_tables(c, statistic(problem.mean), statistic(problem.mean_lo), statistic(problem.rstd));
  }
  void fill_tables(int64_t c, double mean, double mean_lo, double rstd) const {
    const double scale = read_channel(problem.gamma, c, 1) * rstd, beta = read_channel(problem.beta, c, 0);
    tables.hi[c] = static_cast<F>(with_canonical_nan(mean));
    tables.scale[c] = static_cast<F>(with_canonical_nan(scale));
    tables.beta[c] = static_cast<F>(with_canonical_nan(beta));
    // With a variance of 0 in running statistics the scale is infinite, and scale * mean_lo would be NaN where mean_lo
    // is 0.
    tables.offset[c] = static_cast<F>(with_canonical_nan(mean_lo == 0 ? beta : beta - scale * mean_lo));
  }

 protected:
  using Base::row;

  // The pass over padding for a pass over valid elements.
  template <class Pass> static typename Pass::Padding padding_pass(const Pass& pass, const Tables<F>& tables) {
    typename Pass::Padding padding{};
    padding.tables = tables;
    padding.options = pass.options;
    padding.options.is_padding = true;
    return padding;
  }

 private:
  using Base::element_step_, Base::row_step_, Base::valid_length;

  template <class Pass> static constexpr bool has_padding_pass = !__is_same(typename Pass::Padding, void);

  // The tables that a pass and its pass over padding use.
  template <class Pass> unsigned tables_used_by() const {
    if constexpr (has_padding_pass<Pass>)
      if (options.normalized_padding) return Pass::used_tables | Pass::Padding::used_tables;
    return Pass::used_tables;
  }

  // ---- workspace ----

  // `make_plan` computes the size of all allocations.
  template <class P> P* allocate(int64_t length) {
    char* const begin = free_ + -reinterpret_cast<uintptr_t>(free_) % cache_line_bytes;
    free_ = begin + length * sizeof(P);
    assert(free_ <= end_);
    return reinterpret_cast<P*>(begin);
  }
  Tables<F> allocate_tables(int64_t length) {
    static_assert(sizeof(Tables<F>) == coefficient_tables * sizeof(F*) && width<Pair> <= table_slack);
    const auto table = [&] { return allocate<F>(length + table_slack); };
    return {table(), table(), table(), table(), table(), table(), table()};
  }

  const Tables<F>& tables_for(const ChannelSlice& slice) const {
    return plan.family == Family::rows ? tables : slice.columns;
  }

  // Copies the slice's coefficients in the tables that `used` names to the columns of their channels.
  void fill_column_tables(const ChannelSlice& slice, unsigned used) const {
    if (plan.family == Family::rows) return;
    using Vector = typename Compute<F>::V;
    const Tables<F>& columns = slice.columns;
    struct Copy {
      unsigned table;
      const F* from;
      F* to;
    };
    const Copy copies[] = {{use_hi, tables.hi, columns.hi},
                           {use_scale, tables.scale, columns.scale},
                           {use_offset, tables.offset, columns.offset},
                           {use_beta, tables.beta, columns.beta},
                           {use_a, tables.a, columns.a},
                           {use_b, tables.b, columns.b},
                           {use_c, tables.c, columns.c}};
    const auto for_tables = [&](const auto& body) {
      for (const auto& copy : copies)
        if (used & copy.table) body(copy.from, copy.to);
    };
    if (plan.family == Family::columns)
      return slice.team.parallel_for(0, plan.width / problem.C, 1, [&](Range sides) {
        for_tables([&](const F* from, F* to) {
          for (int64_t side = sides.begin; side < sides.end; ++side)
            for (int64_t c = 0; c < problem.C; ++c) to[side * problem.C + c] = from[c];
        });
      });
    for_channels(slice, [&](Range range) {
      // Stores whole vectors, whose excess the next channel overwrites, except at the end of this range.
      const int64_t end = (range.end - slice.channels.begin) * problem.S;
      for_tables([&](const F* from, F* to) {
        for (int64_t c = range.begin; c < range.end; ++c) {
          const int64_t begin = (c - slice.channels.begin) * problem.S;
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

  // The range that is cut into blocks: the slice's channels, or its columns, counted from its first one.
  Range blocked_range(const ChannelSlice& slice) const {
    if (plan.family == Family::rows) return slice.channels;
    if (plan.family == Family::columns) return {0, plan.width};
    return {0, (slice.channels.end - slice.channels.begin) * problem.S};
  }

  // One step of the slice's team: calls body(i, block) for [0, count) x the blocks of `blocked_range`. A map takes the
  // tiles from last to first, because the reduction has read the last ones most recently.
  template <class Body> void for_tiles(const ChannelSlice& slice, int64_t count, bool is_map, const Body& body) const {
    const Range all = blocked_range(slice);
    const int64_t blocks = (all.end - all.begin + plan.block - 1) / plan.block, tiles = blocks * count;
    slice.team.parallel_for(0, tiles, 1, [&](Range range) {
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t tile = is_map ? tiles - 1 - i : i, begin = all.begin + tile % blocks * plan.block;
        body(tile / blocks, Range{begin, min(all.end, begin + plan.block)});
      }
      if (is_map && plan.is_streaming) fence();
    });
  }

  // ---- tiles of rows ----
  //
  // In the order of memory: all channels of one n, then the next n.

  template <class Pass> void reduce_row_tile(const Pass& pass, int64_t k, Range channels) const {
    Sums<typename Pass::Sum> sums[row_block];
    const int64_t s = k % plan.chunks_per_row * plan.chunk_s, end = min(problem.S, s + plan.chunk_s);
    const int64_t n = k / plan.chunks_per_row * plan.chunk_n;
    for (int64_t i = n; i < min(problem.N, n + plan.chunk_n); ++i)
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t valid = max(0, min(valid_length(i, c), end) - s), invalid = end - s - valid;
        const Row<T> start = row(i, c, s);
        Sums<typename Pass::Sum>& sum = sums[c - channels.begin];
        if (valid) reduce_row(pass, start, pass.template coefficients<broadcast_channel<V>>(c), valid, sum);
        if constexpr (has_padding_pass<Pass>)
          if (invalid && options.normalized_padding) {
            const auto padding = padding_pass(pass, pass.tables);
            reduce_row(padding, start.offset_by(element_step_, valid),
                       padding.template coefficients<broadcast_channel<V>>(c), invalid, sum);
          }
      }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      sum_p_[c * plan.chunks + k] = sums[c - channels.begin].total_p();
      sum_pq_[c * plan.chunks + k] = sums[c - channels.begin].total_pq();
    }
  }

  template <class Pass> BATCHNORM_NOCLONE void map_row_tile(const Pass& pass, int64_t part, Range channels) const {
    const int64_t n = part / plan.chunks_per_row, s = part % plan.chunks_per_row * plan.chunk_s;
    const int64_t end = min(problem.S, s + plan.chunk_s);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t valid = max(0, min(valid_length(n, c), end) - s), invalid = end - s - valid;
      const Row<T> start = row(n, c, s), padding_start = start.offset_by(element_step_, valid);
      if (valid) map_row(pass, start, pass.template coefficients<broadcast_channel<V>>(c), valid, plan.is_streaming);
      if (invalid)
        pad(pass, padding_start, invalid, [&](const auto& padding) {
          map_row(padding, padding_start, padding.template coefficients<broadcast_channel<V>>(c), invalid, false);
        });
    }
  }

  // ---- tiles of columns ----

  // Rows traversed together: some 16 streams, which is as many as the processor recognizes, provided each continues for
  // a page. Shorter rows are read faster one after the other, in the order of memory (twice as fast from memory at 256
  // columns).
  template <class Pass> static constexpr int row_group = Pass::num_arrays <= 2 ? 8 : 4;

  // Shorter pieces of a row (less than a page) are streamed to several rows in turn.
  static constexpr int64_t streamed_piece_bytes = 4096;

  template <class Pass>
  void reduce_column_tile(const ChannelSlice& slice, const Pass& pass, int64_t k, Range columns) const {
    constexpr int64_t max_columns = max_block + width<Pair>;
    const int rows_per_fold = 4 * additions_per_fold(pass);  // rows that are summed in the precision of the elements
    const int64_t width = columns.end - columns.begin;
    alignas(64) F partial_sums[2][max_columns];
    alignas(64) double sums[2][max_columns];
    // A fold adds up all columns of a channel: adjacent ones in short rows, columns from each row side by side
    // otherwise.
    const bool is_short = plan.family == Family::short_rows;
    const int64_t block_channels = is_short ? width / problem.S : min(width, problem.C);
    for (int i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < width; ++j) partial_sums[i][j] = 0;
      for (int64_t j = 0; j < block_channels; ++j) sums[i][j] = 0;
    }
    const auto fold = [&] {
      for (int i = 0; i < 2; ++i) {
        if (is_short)
          for (int64_t c = 0; c < block_channels; ++c) sums[i][c] += sum_of(partial_sums[i] + c * problem.S, problem.S);
        else
          for (int64_t side = 0; side < width; side += block_channels)
            for (int64_t j = 0; j < block_channels; ++j) sums[i][j] += partial_sums[i][side + j];
        for (int64_t j = 0; j < width; ++j) partial_sums[i][j] = 0;
      }
    };
    int unfolded_rows = 0;
    this->for_row_runs(slice, k, [&](Row<T> row, int64_t rows, int64_t length, bool is_valid) {
      const int64_t end = min(columns.end, length);
      if (end <= columns.begin) return;
      const auto reduce_run = [&](const auto& run_pass) {
        while (rows) {
          const int count = plan.has_row_groups && rows >= row_group<Pass> ? row_group<Pass> : 1;
          if (count > 1)
            reduce_columns<row_group<Pass>>(run_pass, row, row_step_, columns.begin, end, partial_sums[0],
                                            partial_sums[1]);
          else reduce_columns<1>(run_pass, row, row_step_, columns.begin, end, partial_sums[0], partial_sums[1]);
          row = row.offset_by(row_step_, count);
          rows -= count;
          if ((unfolded_rows += count) >= rows_per_fold) fold(), unfolded_rows = 0;
        }
      };
      if (is_valid) return reduce_run(pass);
      if constexpr (has_padding_pass<Pass>)
        if (options.normalized_padding) reduce_run(padding_pass(pass, pass.tables));
    });
    if (unfolded_rows) fold();
    const int64_t first_channel = is_short ? slice.channels.begin + columns.begin / problem.S : columns.begin;
    const int64_t stride = is_short ? plan.chunks : 1;
    const int64_t begin = is_short ? first_channel * plan.chunks + k : k * problem.C + first_channel;
    for (int64_t j = 0; j < block_channels; ++j)
      sum_p_[begin + j * stride] = sums[0][j], sum_pq_[begin + j * stride] = sums[1][j];
  }

  template <class Pass>
  BATCHNORM_NOCLONE void map_column_tile(const ChannelSlice& slice, const Pass& pass, int64_t k, Range columns) const {
    this->for_row_runs(slice, k, [&](Row<T> row, int64_t rows, int64_t length, bool is_valid) {
      const int64_t begin = columns.begin, end = min(columns.end, length);
      if (end <= begin) return;
      const auto next = [&](int count) { rows -= count, row = row.offset_by(row_step_, count); };
      if (!is_valid)
        for (; rows; next(1))
          pad(pass, row.offset_by(element_step_, begin), end - begin,
              [&](const auto& padding) { map_columns<1>(padding, row, row_step_, begin, end); });
      if (plan.is_streaming) {
        // One store fills a line, or lines are filled four at a time. The latter is slow on some processors where rows
        // are as far apart as images are large; single rows are slow everywhere if their pieces are short.
        constexpr bool fills_line = line_vectors<T> == 1;
        constexpr int group = fills_line ? row_group<Pass> : 4, lines = fills_line ? 1 : 4;
        const bool is_in_turn =
            fills_line || plan.family == Family::columns || plan.block * int64_t{sizeof(T)} < streamed_piece_bytes;
        if (plan.has_row_groups && is_in_turn)
          for (; rows >= group; next(group)) stream_columns<group, lines>(pass, row, row_step_, begin, end);
        for (; rows; next(1)) stream_columns<1, lines>(pass, row, row_step_, begin, end);
      } else {
        constexpr int group = row_group<Pass>;
        if (plan.has_row_groups)
          for (; rows >= group; next(group)) map_columns<group>(pass, row, row_step_, begin, end);
        for (; rows; next(1)) map_columns<1>(pass, row, row_step_, begin, end);
      }
    });
  }

  // Stores the results for padding (part of a row): zeros, or the results of `map_padding(padding)`.
  template <class Pass, class MapPadding>
  void pad(const Pass& pass, const Row<T>& row, int64_t length, const MapPadding& map_padding) const {
    if constexpr (has_padding_pass<Pass>)
      if (options.normalized_padding) return map_padding(padding_pass(pass, pass.tables));
    if (row.out) __builtin_memset(row.out, 0, length * sizeof(T));
    if (row.dresidual) __builtin_memset(row.dresidual, 0, length * sizeof(T));
  }

  char* free_;                        // the rest of the workspace,
  [[maybe_unused]] const char* end_;  // and its end
  double *sum_p_, *sum_pq_;           // sums of each chunk: [C][chunks], in the columns family [chunks][C]
};

}  // namespace batchnorm::BATCHNORM_ISA
