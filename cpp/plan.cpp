#include "plan.hpp"

#include <algorithm>
#include <numeric>

namespace batchnorm {
namespace {

constexpr int64_t widest_vector = 16;   // floats; the same for every instruction set, so that the cuts are too
constexpr int64_t row_chunk = 8192;     // elements of a channel that are summed in one go
constexpr int64_t column_block = 512;   // columns whose sums stay in the first-level cache
constexpr int64_t widest_row = 4096;    // columns, of rows put side by side

// What a thread reads between two passes over it. More than fits some second-level caches: with few channels at a time
// the stretches of contiguous memory are short, and starting on one costs more than a read from the third level.
constexpr int64_t cache_bytes = 1 << 20;

// Bytes of all tensors from which results are streamed: they would push each other out of a third level of 32 MiB.
constexpr int64_t streamed_bytes = 24 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Predicate> bool all_tensors(const Problem& p, Predicate holds) {
  for (const Tensor* t : {&p.x, &p.residual, &p.dy, &p.y, &p.dx, &p.dresidual})
    if (t->data && !holds(*t)) return false;
  return true;
}

void plan_rows(const Problem& p, Plan& plan) {
  plan.is_columns = false;
  plan.width = plan.pitch = p.C;
  plan.inner = 1;
  plan.chunks_per_row = std::max<int64_t>(1, ceil_div(p.S, row_chunk));
  if (plan.chunks_per_row > 1) {
    plan.chunk_n = 1;
    plan.chunk_s = row_chunk;
    plan.chunks = p.N * plan.chunks_per_row;
  } else {
    plan.chunk_n = std::max<int64_t>(1, row_chunk / std::max<int64_t>(1, p.S));
    plan.chunk_s = std::max<int64_t>(1, p.S);
    plan.chunks = ceil_div(p.N, plan.chunk_n);
  }
}

void plan_columns(const Problem& p, Plan& plan, int64_t width, int64_t inner, bool is_flat) {
  plan.is_columns = true;
  plan.inner = inner;
  plan.is_flat = is_flat;
  plan.elements = p.N * p.C * p.S;
  const int64_t side_by_side = widest_vector / std::gcd(width, widest_vector);
  if (is_flat && width * side_by_side <= widest_row) width *= side_by_side;
  plan.width = width;
  plan.pitch = ceil_div(width, widest_vector) * widest_vector;
  plan.rows = ceil_div(plan.elements, width);
  // Enough rows that adding up the chunks costs little, enough chunks that every thread has some.
  plan.chunk_n = std::max({int64_t{256}, ceil_div(plan.rows, 256), 16384 / width});
  plan.chunk_s = column_block;
  plan.chunks = ceil_div(plan.rows, plan.chunk_n);
  plan.chunks_per_row = ceil_div(width, column_block);
}

}  // namespace

bool make_plan(const Problem& p, Plan& plan) {
  plan = {};
  const bool is_masked = p.mask.lengths || p.mask.keep.data;
  const Tensor& keep = p.mask.keep;
  const bool has_rows =
      (p.S == 1 || all_tensors(p, [](const Tensor& t) { return t.s == 1; })) && (!keep.data || keep.s <= 1);
  const bool has_columns =
      (p.C == 1 || all_tensors(p, [](const Tensor& t) { return t.c == 1; })) && (!keep.data || keep.c <= 1);
  const bool is_packed = all_tensors(p, [&](const Tensor& t) {
    return (t.c == p.S || p.C == 1) && (p.N == 1 || t.n == p.C * p.S);
  });
  if (has_rows && p.S > 1 && p.S < widest_vector && p.C > 1 && is_packed && !is_masked) {
    plan_columns(p, plan, p.C * p.S, p.S, true);
  } else if (has_rows && (p.S > 1 || !has_columns || p.C == 1)) {
    plan_rows(p, plan);
  } else if (has_columns) {
    const bool is_flat = !is_masked && all_tensors(p, [&](const Tensor& t) {
      return (p.S == 1 || t.s == p.C) && (p.N == 1 || t.n == p.C * p.S);
    });
    plan_columns(p, plan, p.C, 1, is_flat);
  } else {
    return false;
  }
  int64_t tensors = 0;
  all_tensors(p, [&](const Tensor&) { return ++tensors; });
  plan.is_streaming = tensors * p.N * p.C * p.S * size_of(p.dtype) >= streamed_bytes;
  plan.cache_bytes = cache_bytes;
  // As `Job` lays it out, each table on a cache line of its own.
  const int64_t scalar = p.dtype == Dtype::float64 ? 8 : 4, line = 64;
  const int64_t partials = plan.chunks * (plan.is_columns ? plan.pitch : p.C);
  plan.workspace = 2 * 8 * partials + 8 * scalar * (plan.pitch + p.C) + p.C + 24 * line;
  return true;
}

}  // namespace batchnorm
