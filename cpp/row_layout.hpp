// The rows of a problem, and which of their elements are valid.
#pragma once

#include "parallel.hpp"
#include "plan.hpp"
#include "traverse.hpp"

namespace batchnorm::BATCHNORM_ISA {

BATCHNORM_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
BATCHNORM_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T> class RowLayout {
 public:
  using V = typename Compute<T>::V;
  using F = typename Compute<T>::Scalar;
  using Range = Team::Range;

  // Some channels, the team that works on them, and their coefficients by column. In the columns family, all channels.
  struct ChannelSlice {
    Range channels;
    Team& team;
    Tables<F> columns;
  };

  RowLayout(const Problem& problem, const Plan& plan) : problem(problem), plan(plan) {
    const Tensor& mask = problem.mask.bytes;
    const Tensor& out = problem.forward.y.data ? problem.forward.y : problem.backward.dx;
    const bool has_mask = mask.data && (plan.family == Family::rows ? mask.s : mask.c) != 0;
    const bool is_masked = mask.data || problem.mask.lengths;
    // clang-format off
    options = {problem.activation, problem.slope, has_mask, false, is_masked && problem.normalized_padding,
               problem.backward.through_statistics, &has_nonfinite_padding_};
    // clang-format on
    const auto is_present = [](const void* data) { return static_cast<int64_t>(data != nullptr); };
    element_step_ = {1,
                     is_present(problem.residual.data),
                     is_present(problem.backward.dy.data),
                     is_present(out.data),
                     is_present(problem.backward.dresidual.data),
                     has_mask};
    if (plan.is_flat) row_step_ = multiply(element_step_, plan.width);
    else if (plan.family == Family::short_rows)
      row_step_ = {problem.x.n, problem.residual.n, problem.backward.dy.n, out.n, problem.backward.dresidual.n, 0};
    else
      row_step_ = {problem.x.s, problem.residual.s,           problem.backward.dy.s,
                   out.s,       problem.backward.dresidual.s, has_mask ? mask.s : 0};
  }

  const Problem& problem;
  const Plan& plan;
  Options options;

  template <class P> static P* address_of(const Tensor& t, int64_t n, int64_t c, int64_t s) {
    return t.data ? static_cast<P*>(t.data) + n * t.n + c * t.c + s * t.s : nullptr;
  }

  bool is_valid(int64_t n, int64_t c, int64_t s) const {
    const Mask& mask = problem.mask;
    if (mask.lengths) return s < mask.lengths[n];
    return !mask.bytes.data || *address_of<const uint8_t>(mask.bytes, n, c, s);
  }

  // Number of valid elements of channel c.
  int64_t valid_count(int64_t c) const {
    const Problem& p = problem;
    if (!p.mask.lengths && !p.mask.bytes.data) return p.N * p.S;
    int64_t count = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.mask.lengths) count += p.mask.lengths[n];
      else
        for (int64_t s = 0; s < p.S; ++s) count += *address_of<const uint8_t>(p.mask.bytes, n, c, s) != 0;
    }
    return count;
  }

 protected:
  using Step = typename Row<T>::Step;

  static Step multiply(const Step& s, int64_t n) {
    return {s.x * n, s.residual * n, s.dy * n, s.out * n, s.dresidual * n, s.mask * n};
  }

  Row<T> row(int64_t n, int64_t c, int64_t s) const {
    const Problem& p = problem;
    return {address_of<const T>(p.x, n, c, s),
            address_of<const T>(p.residual, n, c, s),
            address_of<const T>(p.backward.dy, n, c, s),
            address_of<T>(p.forward.y.data ? p.forward.y : p.backward.dx, n, c, s),
            address_of<T>(p.backward.dresidual, n, c, s),
            options.has_mask ? address_of<const uint8_t>(p.mask.bytes, n, c, s) : nullptr};
  }

  // The part of row r in a slice's channels, and the length of row r.
  Row<T> row_of(const ChannelSlice& slice, int64_t r) const {
    if (plan.is_flat) return row(0, 0, 0).offset_by(row_step_, r);
    if (plan.family == Family::short_rows) return row(r, slice.channels.begin, 0);
    return row(r / problem.S, 0, r % problem.S);
  }
  int64_t row_length(int64_t r) const {
    return plan.is_flat ? min(plan.width, plan.elements - r * plan.width) : plan.width;
  }

  // Number of leading elements of row (n, c) that may be valid. Where `options.has_mask`, the pass checks each element
  // itself.
  int64_t valid_length(int64_t n, int64_t c) const {
    const Mask& mask = problem.mask;
    if (mask.lengths) return mask.lengths[n];
    if (!mask.bytes.data || options.has_mask) return problem.S;
    return *address_of<const uint8_t>(mask.bytes, n, c, 0) ? problem.S : 0;
  }
  bool is_valid_row(int64_t r) const {
    const Mask& mask = problem.mask;
    if (mask.lengths) return r % problem.S < mask.lengths[r / problem.S];
    return !mask.bytes.data || options.has_mask ||
           *address_of<const uint8_t>(mask.bytes, r / problem.S, 0, r % problem.S);
  }

  // Calls body(row, rows, length, is_valid) for runs of rows of chunk k. The rows of a run are evenly spaced and
  // equally long, and all of them are valid or none is.
  template <class Body> void for_row_runs(const ChannelSlice& slice, int64_t k, const Body& body) const {
    const Mask& mask = problem.mask;
    const int64_t chunk_end = min(plan.rows, (k + 1) * plan.chunk_n);
    for (int64_t r = k * plan.chunk_n; r < chunk_end;) {
      int64_t end = chunk_end;
      bool is_valid_run = true;
      if (plan.is_flat) {
        if (r < end - 1 && row_length(end - 1) < plan.width) --end;
      } else if (plan.family == Family::columns) {
        end = min(end, (r / problem.S + 1) * problem.S);  // rows of one n only
        is_valid_run = is_valid_row(r);
        if (mask.lengths && is_valid_run) end = min(end, r / problem.S * problem.S + mask.lengths[r / problem.S]);
        if (mask.bytes.data && !options.has_mask) {
          int64_t next = r + 1;
          while (next < end && is_valid_row(next) == is_valid_run) ++next;
          end = next;
        }
      }
      body(row_of(slice, r), end - r, slice_length(slice, r), is_valid_run);
      r = end;
    }
  }
  int64_t slice_length(const ChannelSlice& slice, int64_t r) const {
    return plan.family == Family::columns ? row_length(r) : (slice.channels.end - slice.channels.begin) * problem.S;
  }

  Step element_step_, row_step_;  // to the next element of a row, and to the next row of a run
  bool has_nonfinite_padding_ = false;
};

}  // namespace batchnorm::BATCHNORM_ISA
