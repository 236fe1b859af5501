// A problem laid out as rows and tiles, with its workspace: what forward and backward have in common.
#pragma once

#include "parallel.hpp"
#include "plan.hpp"
#include "traverse.hpp"

namespace batchnorm::BATCHNORM_ISA {

BATCHNORM_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
BATCHNORM_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// One channel's number from an array of any element type, and into it.
inline double read(const Channels& channels, int64_t c, double absent) {
  if (!channels.data) return absent;
  const int64_t i = c * channels.stride;
  switch (channels.dtype) {
    case Dtype::float64: return load(static_cast<const double*>(channels.data) + i, 1)[0];
    case Dtype::float32: return load(static_cast<const float*>(channels.data) + i, 1)[0];
    case Dtype::bfloat16: return load(static_cast<const bfloat16*>(channels.data) + i, 1)[0];
    default: return load(static_cast<const float16*>(channels.data) + i, 1)[0];
  }
}

inline void write(const Channels& channels, int64_t c, double value) {
  if (!channels.data) return;
  const int64_t i = c * channels.stride;
  const Vf narrow = broadcast<Vf>(static_cast<float>(value));
  switch (channels.dtype) {
    case Dtype::float64: return store(static_cast<double*>(channels.data) + i, broadcast<Vd>(value), 1);
    case Dtype::float32: return store(static_cast<float*>(channels.data) + i, narrow, 1);
    case Dtype::bfloat16: return store(static_cast<bfloat16*>(channels.data) + i, narrow, 1);
    default: return store(static_cast<float16*>(channels.data) + i, narrow, 1);
  }
}

template <class T> class Job {
 public:
  using V = typename Compute<T>::V;
  using F = typename Compute<T>::Scalar;

  const Problem& problem;
  const Plan& plan;
  Options options;
  Tables<F> tables;         // by channel
  Tables<F> column_tables;  // by column; the same where a column is a channel
  typename Row<T>::Step step;  // columns: from a row to the next of the same n
  double *first, *second;   // the sums of each chunk: rows [C][chunks], columns [chunks][pitch]
  uint8_t* again;           // channels that have to be measured once more

  Job(const Problem& problem, const Plan& plan, void* workspace) : problem(problem), plan(plan) {
    const Tensor& keep = problem.mask.keep;
    options = {problem.activation, problem.slope, keep.data && (plan.is_columns ? keep.c : keep.s) != 0,
               false, problem.normalized_padding, problem.through_statistics};
    const Tensor& out = problem.y.data ? problem.y : problem.dx;
    step = plan.is_flat ? typename Row<T>::Step{plan.width, plan.width, plan.width, plan.width, plan.width, 0}
                        : typename Row<T>::Step{problem.x.s, problem.residual.s, problem.dy.s, out.s,
                                                problem.dresidual.s, keep.s};
    char* free = static_cast<char*>(workspace);
    free += -reinterpret_cast<uintptr_t>(free) % 64;
    const auto take = [&](int64_t bytes) {
      char* taken = free;
      free += (bytes + 63) / 64 * 64;
      return taken;
    };
    const int64_t partials = plan.chunks * (plan.is_columns ? plan.pitch : problem.C);
    first = reinterpret_cast<double*>(take(8 * partials));
    second = reinterpret_cast<double*>(take(8 * partials));
    const auto take_tables = [&](int64_t length) {
      const auto table = [&] { return reinterpret_cast<F*>(take(sizeof(F) * length)); };
      return Tables<F>{table(), table(), table(), table(), table(), table(), table(), table()};
    };
    const bool is_own = plan.is_columns && plan.width != problem.C;
    column_tables = take_tables(plan.pitch);
    tables = is_own ? take_tables(problem.C) : column_tables;
    again = reinterpret_cast<uint8_t*>(take(problem.C));
  }

  // ---- where things are ----

  template <class P> static P* at(const Tensor& t, int64_t n, int64_t c, int64_t s) {
    return t.data ? static_cast<P*>(t.data) + n * t.n + c * t.c + s * t.s : nullptr;
  }

  Row<T> row(int64_t n, int64_t c, int64_t s) const {
    const Problem& p = problem;
    return {at<const T>(p.x, n, c, s), at<const T>(p.residual, n, c, s), at<const T>(p.dy, n, c, s),
            at<T>(p.y.data ? p.y : p.dx, n, c, s), at<T>(p.dresidual, n, c, s),
            options.has_mask ? at<const uint8_t>(p.mask.keep, n, c, s) : nullptr};
  }

  // Columns: row r, whatever n and s it is.
  Row<T> row(int64_t r) const {
    if (plan.is_flat) return row(0, 0, 0) + r * plan.width;
    return row(r / problem.S, 0, r % problem.S);
  }
  int64_t length(int64_t r) const {
    return plan.is_flat ? min(plan.width, plan.elements - r * plan.width) : plan.width;
  }

  // How many leading elements of row (n, c) may count; a mask element by element is seen to by the pass.
  int64_t kept(int64_t n, int64_t c) const {
    const Mask& mask = problem.mask;
    if (mask.lengths) return mask.lengths[n];
    if (!mask.keep.data || options.has_mask) return problem.S;
    return *at<const uint8_t>(mask.keep, n, c, 0) ? problem.S : 0;
  }
  bool is_kept(int64_t r) const {
    const Mask& mask = problem.mask;
    if (mask.lengths) return r % problem.S < mask.lengths[r / problem.S];
    return !mask.keep.data || options.has_mask || *at<const uint8_t>(mask.keep, r / problem.S, 0, r % problem.S);
  }
  bool counts(int64_t n, int64_t c, int64_t s) const {
    const Mask& mask = problem.mask;
    if (mask.lengths) return s < mask.lengths[n];
    return !mask.keep.data || *at<const uint8_t>(mask.keep, n, c, s);
  }

  // ---- tiles ----

  // Columns cannot be divided among teams; `channels` is then all of them.
  using Range = Team::Range;

  static constexpr int64_t channel_block = 32;  // channels of a row tile, whose sums are on the stack

  static int64_t blocks(int64_t length, int64_t block) { return (length + block - 1) / block; }
  static Range block_of(Range all, int64_t i, int64_t block) {
    return {all.begin + i * block, min(all.end, all.begin + (i + 1) * block)};
  }

  // body(i, block) for this member's share of [0, count) x the blocks of `across`.
  template <class Body>
  static void for_tiles(int64_t count, Range across, int64_t block, const Team& team, bool is_backwards,
                        const Body& body) {
    const int64_t width = blocks(across.end - across.begin, block);
    const Range mine = team.share(0, width * count);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t tile = is_backwards ? mine.end - 1 - (i - mine.begin) : i;
      body(tile / width, block_of(across, tile % width, block));
    }
  }

  // The sums of `pass` over each chunk.
  template <class Pass> void reduce(const Pass& pass, Range channels, const Team& team) const {
    if (plan.is_columns)
      for_tiles(plan.chunks, {0, plan.width}, plan.chunk_s, team, false,
                [&](int64_t k, Range columns) { reduce_column_tile(pass, k, columns); });
    else
      for_tiles(plan.chunks, channels, channel_block, team, false,
                [&](int64_t k, Range block) { reduce_row_tile(pass, k, block); });
  }

  // Rows next to each other in memory one after the other: the channels of one n, then those of the next.
  template <class Pass> void reduce_row_tile(const Pass& pass, int64_t k, Range channels) const {
    Sums<V> sums[channel_block];
    const int64_t s = k % plan.chunks_per_row * plan.chunk_s, end = min(problem.S, s + plan.chunk_s);
    const int64_t n = k / plan.chunks_per_row * plan.chunk_n;
    for (int64_t i = n; i < min(problem.N, n + plan.chunk_n); ++i)
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t length = min(kept(i, c), end) - s;
        if (length > 0)
          reduce_row(pass, row(i, c, s), pass.template coefficients<by_channel<V>>(c), length, sums[c - channels.begin]);
      }
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      first[c * plan.chunks + k] = sums[c - channels.begin].total_first();
      second[c * plan.chunks + k] = sums[c - channels.begin].total_second();
    }
  }

  template <class Pass> void reduce_column_tile(const Pass& pass, int64_t k, Range columns) const {
    constexpr int group = 8;
    double *a = first + k * plan.pitch, *b = second + k * plan.pitch;
    for (int64_t j = columns.begin; j < columns.end; ++j) a[j] = b[j] = 0;
    for_runs({k * plan.chunk_n, min(plan.rows, (k + 1) * plan.chunk_n)}, [&](Range run, int64_t length, bool is_kept) {
      if (!is_kept) return;
      const int64_t end = min(columns.end, length);
      int64_t r = run.begin;
      for (; r + group <= run.end; r += group)
        reduce_columns<group>(pass, row(r), step, columns.begin, end, a, b);
      for (; r < run.end; ++r) reduce_columns<1>(pass, row(r), step, columns.begin, end, a, b);
    });
  }

  // body(run, length, is_kept) for runs of rows that are evenly spaced, equally long, and all kept or none.
  template <class Body> void for_runs(Range rows, const Body& body) const {
    for (int64_t r = rows.begin; r < rows.end;) {
      const int64_t whole = length(r);
      int64_t end = rows.end;
      if (!plan.is_flat) end = min(end, (r / problem.S + 1) * problem.S);  // the rows of one n
      else if (end == plan.rows && r < end - 1 && length(end - 1) < plan.width) --end;
      const bool is_here_kept = is_kept(r);
      if (problem.mask.lengths) {
        if (is_here_kept) end = min(end, r / problem.S * problem.S + problem.mask.lengths[r / problem.S]);
      } else if (problem.mask.keep.data && !options.has_mask) {
        int64_t next = r + 1;
        while (next < end && is_kept(next) == is_here_kept) ++next;
        end = next;
      }
      body(Range{r, end}, whole, is_here_kept);
      r = end;
    }
  }

  // The results of `pass`, and of `padding` (or zeros) where nothing counts. From the end, whose elements the
  // reduction has read last.
  template <class Pass> void map(const Pass& pass, Range channels, const Team& team) const {
    if (plan.is_columns)
      for_tiles(plan.chunks, {0, plan.width}, plan.chunk_s, team, true,
                [&](int64_t k, Range columns) { map_column_tile(pass, k, columns); });
    else
      for_tiles(problem.N * plan.chunks_per_row, channels, channel_block, team, true,
                [&](int64_t row, Range block) { map_row_tile(pass, row, block); });
    if (plan.is_streaming) fence();
  }

  template <class Pass> void map_row_tile(const Pass& pass, int64_t part, Range channels) const {
    const int64_t n = part / plan.chunks_per_row, s = part % plan.chunks_per_row * plan.chunk_s;
    const int64_t end = min(problem.S, s + plan.chunk_s);
    for (int64_t c = channels.begin; c < channels.end; ++c) {
      const int64_t counting = max(0, min(kept(n, c), end) - s), rest = end - s - counting;
      const Row<T> here = row(n, c, s);
      if (counting)
        map_row(pass, here, pass.template coefficients<by_channel<V>>(c), counting, plan.is_streaming);
      if (rest) pad(here + counting, rest, [&](const auto& padding) {
        map_row(padding, here + counting, padding.template coefficients<by_channel<V>>(c), rest, false);
      });
    }
  }

  template <class Pass> void map_column_tile(const Pass& pass, int64_t k, Range columns) const {
    constexpr int group = 4;
    for_runs({k * plan.chunk_n, min(plan.rows, (k + 1) * plan.chunk_n)}, [&](Range run, int64_t length, bool is_kept) {
      const int64_t begin = columns.begin, end = min(columns.end, length);
      int64_t r = run.begin;
      if (is_kept && begin < end) {
        for (; r + group <= run.end; r += group)
          map_columns<group>(pass, row(r), step, begin, end, plan.is_streaming);
        for (; r < run.end; ++r) map_columns<1>(pass, row(r), step, begin, end, plan.is_streaming);
      }
      for (; r < run.end && begin < end; ++r)
        pad(row(r) + begin, end - begin, [&](const auto& padding) {
          map_columns<1>(padding, row(r), step, begin, end, false);
        });
    });
  }

  // What comes out where no element of (a part of) a row counts: zeros, or what `normalize(pass)` stores.
  template <class Normalize> void pad(const Row<T>& row, int64_t length, const Normalize& normalize) const {
    if (options.normalized_padding && problem.y.data) {
      Forward<T, Form::general> padding{plan.is_columns ? column_tables : tables, options};
      padding.options.is_padding = true;
      return normalize(padding);
    }
    if (row.out) __builtin_memset(row.out, 0, length * sizeof(T));
    if (row.dresidual) __builtin_memset(row.dresidual, 0, length * sizeof(T));
  }

  // ---- channels ----

  // The sums over all chunks (and columns) of channel c, in a fixed order.
  void total_of(int64_t c, double& a, double& b) const {
    a = b = 0;
    if (!plan.is_columns) {
      for (int64_t k = 0; k < plan.chunks; ++k) a += first[c * plan.chunks + k], b += second[c * plan.chunks + k];
      return;
    }
    for (int64_t side = c * plan.inner; side < plan.width; side += problem.C * plan.inner)
      for (int64_t j = side; j < side + plan.inner; ++j)
        for (int64_t k = 0; k < plan.chunks; ++k) a += first[k * plan.pitch + j], b += second[k * plan.pitch + j];
  }

  // The coefficients of z, from statistics and parameters.
  void fill_tables(int64_t c) const {
    const auto statistic = [c](const void* table) { return static_cast<double>(static_cast<const F*>(table)[c]); };
    const double rstd = statistic(problem.rstd), scale = read(problem.gamma, c, 1) * rstd;
    tables.hi[c] = static_cast<F>(statistic(problem.mean));
    tables.rstd[c] = static_cast<F>(rstd);
    tables.scale[c] = static_cast<F>(scale);
    tables.beta[c] = static_cast<F>(read(problem.beta, c, 0));
    tables.offset[c] = static_cast<F>(read(problem.beta, c, 0) - scale * statistic(problem.mean_lo));
  }

  // Copies the channels' coefficients to their columns.
  void spread(const Team& team) const {
    if (tables.hi == column_tables.hi) return;
    const Range mine = team.share(0, plan.width);
    F* const Tables<F>::*const all[] = {&Tables<F>::hi, &Tables<F>::scale, &Tables<F>::offset, &Tables<F>::beta,
                                        &Tables<F>::rstd, &Tables<F>::a, &Tables<F>::b, &Tables<F>::c};
    for (F* const Tables<F>::*table : all)
      for (int64_t j = mine.begin; j < mine.end; ++j)
        (column_tables.*table)[j] = (tables.*table)[plan.channel_of(j, problem.C)];
    team.barrier();
  }

  const Tables<F>& pass_tables() const { return plan.is_columns ? column_tables : tables; }

  // Elements that count in channel c.
  int64_t count_of(int64_t c) const {
    const Problem& p = problem;
    if (!p.mask.lengths && !p.mask.keep.data) return p.N * p.S;
    int64_t count = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.mask.lengths) count += p.mask.lengths[n];
      else for (int64_t s = 0; s < p.S; ++s) count += *at<const uint8_t>(p.mask.keep, n, c, s) != 0;
    }
    return count;
  }

  // Calls run(channels, team) so that all channels are done. A channel's second pass finds it in the core's cache if
  // one thread does both, so each takes a few channels at a time; all threads share each channel where there are too
  // few channels to go round.
  template <class Run> void run(bool has_reduction, const Run& run) const {
    const int64_t C = problem.C, threads = problem.threads;
    if (plan.is_columns || !has_reduction || (threads > 1 && C < 8 * threads && C % threads))
      return parallel(problem.threads, [&](const Team& team) { run(Range{0, C}, team); });
    const int64_t tensors = 1 + (problem.dy.data != nullptr) + (problem.residual.data != nullptr);
    const int64_t bytes = max(1, problem.N * problem.S * static_cast<int64_t>(sizeof(T)) * tensors);
    const int64_t block = max(1, min(min(plan.cache_bytes / bytes, channel_block), C / (4 * threads)));
    int64_t next = 0;
    parallel(problem.threads, [&](const Team&) {
      for (;;) {
        const int64_t begin = __atomic_fetch_add(&next, block, __ATOMIC_RELAXED);
        if (begin >= C) return;
        run(Range{begin, min(C, begin + block)}, Team{});
      }
    });
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
