#include "plan.hpp"

#include <algorithm>
#include <numeric>

#include "caches.hpp"

namespace batchnorm {
namespace {

// ---- Constants that determine the order of sums ----
//
// Fixed forever, like `max_block`, `vector_width` and the numbers in `plan_short_rows` and `plan_columns`. With other
// values, results would have other bits than those of earlier versions.

constexpr int64_t row_chunk = 8192;         // elements of a channel in one chunk
constexpr int64_t column_chunk = 32768;     // elements of all columns in one chunk, at least
constexpr int64_t min_row = 128;            // with smaller S, a row of one channel is too short for the rows family
constexpr int64_t min_ragged_row = 1024;    // the limit if S is not a multiple of the vector width
constexpr int64_t flat_row_columns = 2048;  // target for the columns of rows that are put side by side,
constexpr int64_t min_flat_rows = 256;      // if at least this many rows remain

// Several rows are traversed together, and their terms added up before they enter a column's sum, if rows have at least
// this many columns, or any number of columns in a tensor that is small enough for a near cache.
constexpr int64_t page_row = 768;
constexpr int64_t small_bytes = 256 << 10;

// ---- Constants that determine only the speed ----
//
// Free to change: these choose the thread that computes a sum, how results are stored, or the family of a pass without
// sums.

// `min_ragged_row` for a pass that takes no sums and does not stream.
constexpr int64_t min_ragged_row_single_pass = 512;

// Bytes that a thread reads between two passes over them. This may be more than its second-level cache holds: with
// fewer channels at a time the contiguous stretches of memory are short, and the start of a stretch costs more than a
// read from the third level, which all threads share.
int64_t bytes_between_passes(int threads) {
  const Caches sizes = caches();
  return std::max(sizes.l2, sizes.l3 / (4 * threads));
}

// Results are streamed if all tensors together have at least this many bytes, as they would evict each other from the
// third-level cache. The limit is lower where a thread goes over the same channels twice, as results would evict these
// from the nearer levels, and for uncached results: a line that is in no cache would be read before it is written.
int64_t min_streamed_bytes(bool is_by_channel, bool is_uncached) {
  const int64_t l3 = caches().l3;
  return is_uncached ? l3 / (is_by_channel ? 8 : 2) : l3 / 8 * (is_by_channel ? 6 : 7);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_least_1(int64_t a) { return std::max<int64_t>(1, a); }

// Elements of the widest vector of any instruction set, so that the partition is the same for all.
int64_t vector_width(const Problem& p) { return size_of(p.dtype) == 2 ? 32 : 16; }

template <class Predicate> bool all_tensors(const Problem& p, Predicate holds) {
  for (const Tensor* t : {&p.x, &p.residual, &p.backward.dy, &p.forward.y, &p.backward.dx, &p.backward.dresidual})
    if (t->data && !holds(*t)) return false;
  return true;
}

void plan_rows(const Problem& p, Plan& plan) {
  plan.family = Family::rows;
  plan.block = row_block;
  plan.chunks_per_row = at_least_1(ceil_div(p.S, row_chunk));
  const bool is_split = plan.chunks_per_row > 1;
  plan.chunk_n = is_split ? 1 : at_least_1(row_chunk / at_least_1(p.S));
  plan.chunk_s = is_split ? row_chunk : at_least_1(p.S);
  plan.chunks = ceil_div(p.N, plan.chunk_n) * plan.chunks_per_row;
}

// The smallest number of columns that is both a number of whole channels and of whole vectors.
int64_t aligned_columns(const Problem& p) { return vector_width(p) / std::gcd(p.S, vector_width(p)) * p.S; }

// True if several channels are better taken together: rows are short, and few channels are a number of whole vectors.
bool has_short_rows(const Problem& p, bool is_single_pass, bool is_streaming) {
  const int64_t min_ragged = is_single_pass && !is_streaming ? min_ragged_row_single_pass : min_ragged_row;
  const int64_t min_length = p.S % vector_width(p) ? min_ragged : min_row;
  return p.C > 1 && p.S > 1 && p.S < min_length && aligned_columns(p) <= max_block;
}

void plan_short_rows(const Problem& p, Plan& plan) {
  plan.family = Family::short_rows;
  plan.width = p.C * p.S;
  plan.rows = p.N;
  plan.block = aligned_columns(p) * at_least_1(flat_row_columns / aligned_columns(p));
  plan.chunk_n = std::max<int64_t>(64, row_chunk / p.S);
  plan.chunks = ceil_div(plan.rows, plan.chunk_n);
}

void plan_columns(const Problem& p, Plan& plan, bool is_flat) {
  plan.family = Family::columns;
  plan.is_flat = is_flat;
  plan.width = p.C;
  const int64_t aligned = vector_width(p) / std::gcd(p.C, vector_width(p)) * p.C;
  const int64_t target = std::min(flat_row_columns, plan.elements / min_flat_rows);
  if (is_flat && aligned <= max_block) plan.width = aligned * at_least_1(target / aligned);
  plan.rows = ceil_div(plan.elements, plan.width);
  const int64_t blocks = at_least_1(ceil_div(plan.width, max_block));
  plan.block = ceil_div(at_least_1(ceil_div(plan.width, blocks)), 32) * 32;
  // Enough chunks for every thread, few enough that adding them up costs little.
  const bool is_small = plan.elements < 8 * column_chunk;
  plan.chunks =
      is_small ? at_least_1(plan.elements / column_chunk) : std::clamp<int64_t>(plan.elements >> 18, 8, 256) / 8 * 8;
  plan.chunk_n = 8 * at_least_1(ceil_div(plan.rows, 8 * plan.chunks));
  plan.chunks = ceil_div(plan.rows, plan.chunk_n);
}

// Channels that a thread takes at a time, or 0 if channels are not divided, because the threads would get unequal
// shares. A few at a time, so that the second pass over them finds in the cache what the first has read.
int64_t channels_per_task(const Problem& p, const Plan& plan, int64_t bytes_per_channel) {
  const int64_t unit = plan.family == Family::short_rows ? plan.block / p.S : 1;
  const int64_t units = ceil_div(p.C, unit);
  if (plan.family == Family::columns || (p.threads > 1 && units < 8 * p.threads && units % p.threads)) return 0;
  return unit * at_least_1(std::min(bytes_between_passes(p.threads) / at_least_1(bytes_per_channel * unit),
                                    units / (4 * p.threads)));
}

// Bytes of the arrays that `Driver` allocates: partial sums, tables by channel, flags for a second computation, and for
// each team tables by column, with their pointers if there are several teams. Each array begins at a cache line;
// `cache_line_bytes` more allow for a workspace that does not.
int64_t workspace_bytes(const Problem& p, const Plan& plan) {
  const auto array = [](int64_t length, int64_t size) {
    return ceil_div(length * size, cache_line_bytes) * cache_line_bytes;
  };
  const int64_t scalar = p.dtype == Dtype::float64 ? 8 : 4;
  const auto tables = [&](int64_t length) { return coefficient_tables * array(length + table_slack, scalar); };
  const int64_t teams = plan.channels_per_task ? p.threads : 1;
  return cache_line_bytes + 2 * array(plan.chunks * p.C, 8) + tables(p.C) + array(p.C, 1) +
         teams * tables(plan.table_length) + array(teams * coefficient_tables, sizeof(void*));
}

}  // namespace

bool make_plan(const Problem& p, Plan& plan) {
  plan = {};
  plan.chunks_per_row = 1;
  plan.elements = p.N * p.C * p.S;
  const bool is_masked = p.mask.lengths || p.mask.bytes.data,
             is_single_pass = p.forward.y.data && !p.forward.computes_moments;
  int64_t read = 0, written = 0;
  for (const Tensor* t : {&p.x, &p.residual, &p.backward.dy}) read += t->data != nullptr;
  for (const Tensor* t : {&p.forward.y, &p.backward.dx, &p.backward.dresidual}) written += t->data != nullptr;
  const int64_t bytes = plan.elements * size_of(p.dtype);
  const auto streams_from = [&](int64_t min_bytes) { return (written + read) * bytes >= min_bytes; };
  const Tensor& mask = p.mask.bytes;
  const bool has_contiguous_rows = (p.S == 1 || all_tensors(p, [](const Tensor& t) { return t.s == 1; })) &&
                                   (!mask.data || mask.s == 0 || mask.s == 1);
  const bool has_contiguous_columns = (p.C == 1 || all_tensors(p, [](const Tensor& t) { return t.c == 1; })) &&
                                      (!mask.data || mask.c == 0 || mask.c == 1);
  if (has_contiguous_rows && (p.S > 1 || !has_contiguous_columns || p.C == 1)) {
    const bool is_packed = all_tensors(p, [&](const Tensor& t) { return t.c == p.S; });
    const bool is_short = has_short_rows(p, is_single_pass, streams_from(min_streamed_bytes(false, false)));
    if (is_short && is_packed && !is_masked) plan_short_rows(p, plan);
    else plan_rows(p, plan);
  } else if (has_contiguous_columns) {
    const auto is_flat = [&](const Tensor& t) { return (p.S == 1 || t.s == p.C) && (p.N == 1 || t.n == p.C * p.S); };
    plan_columns(p, plan, !is_masked && all_tensors(p, is_flat));
  } else {
    return false;
  }
  const bool is_by_channel = plan.family != Family::columns && !is_single_pass;
  // Rows that end within cache lines: streamed, each of these lines would be flushed separately.
  const bool is_ragged = plan.family == Family::rows && p.S < min_ragged_row && (is_masked || p.S % vector_width(p));
  plan.is_streaming = !is_ragged && streams_from(min_streamed_bytes(is_by_channel, p.has_uncached_results));
  plan.has_row_groups = std::min(plan.width, plan.block) >= page_row || bytes <= small_bytes;
  plan.channels_per_task = channels_per_task(p, plan, read * p.N * p.S * size_of(p.dtype));

  if (plan.family == Family::columns) plan.table_length = plan.width;
  if (plan.family == Family::short_rows)
    plan.table_length = (plan.channels_per_task ? plan.channels_per_task : p.C) * p.S;
  plan.workspace_bytes = workspace_bytes(p, plan);
  return true;
}

}  // namespace batchnorm
