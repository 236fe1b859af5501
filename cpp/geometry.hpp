// Where the elements of a problem are: its rows, and which of them count.
#pragma once

#include "parallel.hpp"
#include "plan.hpp"
#include "traverse.hpp"

namespace batchnorm::BATCHNORM_ISA {

BATCHNORM_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
BATCHNORM_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T> class Geometry {
 public:
  using V = typename Compute<T>::V;
  using F = typename Compute<T>::Scalar;
  using Range = Team::Range;

  // Some channels, the team that works on them, and their coefficients by column. Channels last, all of them.
  struct Scope {
    Range channels;
    Team& team;
    Tables<F> columns;
  };

  Geometry(const Problem& problem, const Plan& plan) : problem(problem), plan(plan) {
    const Tensor& keep = problem.mask.keep;
    const Tensor& out = problem.forward.y.data ? problem.forward.y : problem.backward.dx;
    const bool has_mask = keep.data && (plan.family == Family::rows ? keep.s : keep.c) != 0;
    const bool is_masked = keep.data || problem.mask.lengths;
    // clang-format off
    options = {problem.activation, problem.slope, has_mask, false, is_masked && problem.normalized_padding,
               problem.backward.through_statistics, &has_unread_};
    // clang-format on
    const auto is_there = [](const void* data) { return static_cast<int64_t>(data != nullptr); };
    element_ = {1,
                is_there(problem.residual.data),
                is_there(problem.backward.dy.data),
                is_there(out.data),
                is_there(problem.backward.dresidual.data),
                has_mask};
    if (plan.is_flat) step_ = times(element_, plan.width);
    else if (plan.family == Family::short_rows)
      step_ = {problem.x.n, problem.residual.n, problem.backward.dy.n, out.n, problem.backward.dresidual.n, 0};
    else
      step_ = {problem.x.s, problem.residual.s,           problem.backward.dy.s,
               out.s,       problem.backward.dresidual.s, has_mask ? keep.s : 0};
  }

  const Problem& problem;
  const Plan& plan;
  Options options;

  template <class P> static P* at(const Tensor& t, int64_t n, int64_t c, int64_t s) {
    return t.data ? static_cast<P*>(t.data) + n * t.n + c * t.c + s * t.s : nullptr;
  }

  bool counts(int64_t n, int64_t c, int64_t s) const {
    const Mask& mask = problem.mask;
    if (mask.lengths) return s < mask.lengths[n];
    return !mask.keep.data || *at<const uint8_t>(mask.keep, n, c, s);
  }

  // Elements that count in channel c.
  int64_t count_of(int64_t c) const {
    const Problem& p = problem;
    if (!p.mask.lengths && !p.mask.keep.data) return p.N * p.S;
    int64_t count = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.mask.lengths) count += p.mask.lengths[n];
      else
        for (int64_t s = 0; s < p.S; ++s) count += *at<const uint8_t>(p.mask.keep, n, c, s) != 0;
    }
    return count;
  }

 protected:
  using Step = typename Row<T>::Step;

  static Step times(const Step& s, int64_t n) {
    return {s.x * n, s.residual * n, s.dy * n, s.out * n, s.dresidual * n, s.keep * n};
  }

  Row<T> row(int64_t n, int64_t c, int64_t s) const {
    const Problem& p = problem;
    return {at<const T>(p.x, n, c, s),
            at<const T>(p.residual, n, c, s),
            at<const T>(p.backward.dy, n, c, s),
            at<T>(p.forward.y.data ? p.forward.y : p.backward.dx, n, c, s),
            at<T>(p.backward.dresidual, n, c, s),
            options.has_mask ? at<const uint8_t>(p.mask.keep, n, c, s) : nullptr};
  }

  // The part of row r that belongs to a scope, and its length.
  Row<T> row_of(const Scope& scope, int64_t r) const {
    if (plan.is_flat) return row(0, 0, 0).advanced(step_, r);
    if (plan.family == Family::short_rows) return row(r, scope.channels.begin, 0);
    return row(r / problem.S, 0, r % problem.S);
  }
  int64_t length_of(int64_t r) const {
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

  // body(row, rows, length, is_kept) for runs of chunk k's rows that are evenly spaced, equally long, and all kept or
  // none.
  template <class Body> void for_runs(const Scope& scope, int64_t k, const Body& body) const {
    const Mask& mask = problem.mask;
    const int64_t last = min(plan.rows, (k + 1) * plan.chunk_n);
    for (int64_t r = k * plan.chunk_n; r < last;) {
      int64_t end = last;
      bool is_here_kept = true;
      if (plan.is_flat) {
        if (r < end - 1 && length_of(end - 1) < plan.width) --end;
      } else if (plan.family == Family::columns) {
        end = min(end, (r / problem.S + 1) * problem.S);  // the rows of one n
        is_here_kept = is_kept(r);
        if (mask.lengths && is_here_kept) end = min(end, r / problem.S * problem.S + mask.lengths[r / problem.S]);
        if (mask.keep.data && !options.has_mask) {
          int64_t next = r + 1;
          while (next < end && is_kept(next) == is_here_kept) ++next;
          end = next;
        }
      }
      body(row_of(scope, r), end - r, scope_length(scope, r), is_here_kept);
      r = end;
    }
  }
  int64_t scope_length(const Scope& scope, int64_t r) const {
    return plan.family == Family::columns ? length_of(r) : (scope.channels.end - scope.channels.begin) * problem.S;
  }

  Step element_, step_;  // to the next element of a row, and to the next row of a run
  bool has_unread_ = false;
};

}  // namespace batchnorm::BATCHNORM_ISA
