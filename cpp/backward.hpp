// The backward pass: gradients from x, dy and the statistics that normalized x.
#pragma once

#include "driver.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class T> class BackwardDriver : public Driver<T> {
 public:
  using Base = Driver<T>;
  using typename Base::F;
  using typename Base::Range;
  using typename Base::ChannelSlice;
  using Base::Base;
  using Base::problem, Base::plan, Base::options, Base::tables;

  void run() {
    const bool has_common_form = !options.has_mask && problem.backward.dx.data && problem.backward.through_statistics;
    const bool has_residual = problem.residual.data != nullptr,
               has_dresidual = problem.backward.dresidual.data != nullptr;
    if (has_common_form && problem.activation == Activation::identity && !has_dresidual) return run<Form::identity>();
    if (has_common_form && problem.activation == Activation::relu && has_residual == has_dresidual)
      return has_residual ? run<Form::relu_residual>() : run<Form::relu>();
    run<Form::general>();
  }

 private:
  template <Form form> void run() {
    const bool has_outputs = problem.backward.dx.data || problem.backward.dresidual.data;
    const bool uses_dot = form == Form::identity && this->can_use_dot() && !options.normalized_padding &&
                          problem.N * problem.S > 1 && has_means_near_zero();
    Base::for_slices(true, [&](const ChannelSlice& slice) {
      this->for_channels(slice, [&](Range range) {
        for (int64_t c = range.begin; c < range.end; ++c) this->fill_tables(c);
      });
      const GradientTerms<T, form> terms{{{}, options}};
      if (uses_dot) reduce_by_dot(slice);
      else this->reduce(slice, terms);
      this->for_channels(slice, [&](Range range) {
        this->combine_chunks(range);
        for (int64_t c = range.begin; c < range.end; ++c) finish_channel(c, terms, uses_dot);
      });
      if (uses_dot) map_uncentered(slice);
      else if (has_outputs) this->map(slice, Gradient<T, form>{{{}, options}});
    });
  }

  void reduce_by_dot(const ChannelSlice& slice) const {
    if constexpr (has_dot<T>) this->reduce(slice, DotTerms<T, true>{});
  }

  void map_uncentered(const ChannelSlice& slice) const {
    if constexpr (has_dot<T>) this->map(slice, UncenteredGradient<T>{});
  }

  // True if sums of dy * x do not cancel, because all means are close to zero, and the coefficients of x are in the
  // range of floats. All channels decide together, so that the result does not depend on how channels are assigned to
  // threads.
  bool has_means_near_zero() const {
    for (int64_t c = 0; c < problem.C; ++c) {
      const F mean = element_at<F>(problem.mean, c), rstd = element_at<F>(problem.rstd, c);
      if (!(__builtin_fabs(mean * rstd) < 4 && rstd > 1e-3 && rstd < 1e3)) return false;
    }
    return true;
  }

  // Computes dgamma, dbeta and the coefficients of dx for channel c:
  //
  //     dx = gamma * rstd * (dz - E[dz] - xhat * E[dz * xhat]) = a * (dz - c + b * d)
  //
  // with d = x - hi and xhat = rstd * (d - lo). If `is_uncentered`, this is multiplied out about zero: a * dy + b * x +
  // c.
  template <class Terms> void finish_channel(int64_t c, const Terms& terms, bool is_uncentered) {
    const double rstd = element_at<F>(problem.rstd, c), lo = element_at<F>(problem.mean_lo, c);
    const double n =
        static_cast<double>(max(problem.count ? element_at<int64_t>(problem.count, c) : problem.N * problem.S, 1));
    const double xhat_scale = problem.xhat_scale ? element_at<F>(problem.xhat_scale, c) : 1;
    double dbeta, sum_pq;
    this->totals_of(c, dbeta, sum_pq);
    if (is_uncentered) sum_pq -= tables.hi[c] * dbeta;
    // Products of floats can be out of range although the gradient is not.
    const bool is_tiny = sum_pq != 0 || (dbeta != 0 && __builtin_fabs(dbeta) < n * 1e-16);
    const bool is_out_of_range = !(sum_pq - sum_pq == 0) || (is_tiny && __builtin_fabs(sum_pq) < n * 1e-32);
    if (sizeof(F) == 4 && is_out_of_range) sum_pq = sum_pq_in_double(c, terms);
    const double dgamma = rstd * (sum_pq - lo * dbeta), b = -dgamma / n * rstd * xhat_scale;
    write_channel(problem.backward.dgamma, c, with_canonical_nan(dgamma));
    write_channel(problem.backward.dbeta, c, with_canonical_nan(dbeta + nonfinite_padding_dz(c, terms)));
    const double a = read_channel(problem.gamma, c, 1) * rstd, shift = dbeta / n + b * lo;
    tables.a[c] = static_cast<F>(with_canonical_nan(a));
    tables.b[c] = static_cast<F>(with_canonical_nan(is_uncentered ? a * b : b));
    tables.c[c] = static_cast<F>(with_canonical_nan(is_uncentered ? -a * (shift + b * tables.hi[c]) : shift));
  }

  // The sum of dz over normalized padding that is not finite, or 0 without such padding. There y = activation(beta +
  // residual), which depends on beta alone.
  template <class Terms> double nonfinite_padding_dz(int64_t c, const Terms& terms) const {
    if (!__atomic_load_n(options.has_nonfinite_padding, __ATOMIC_RELAXED)) return 0;
    const auto padding = this->padding_pass(terms, tables);
    const auto k = padding.template coefficients<broadcast_channel<typename Base::V>>(c);
    const T* x = Base::template address_of<const T>(problem.x, 0, c, 0);
    double sum = 0;
    for (int64_t n = 0; n < problem.N; ++n)
      for (int64_t s = 0; s < problem.S; ++s) {
        const F d = static_cast<F>(load_scalar(x + n * problem.x.n + s * problem.x.s)) - tables.hi[c];
        if (this->is_valid(n, c, s) || d - d == 0) continue;
        sum += first_lane(padding.dz(this->row(n, c, s), 0, broadcast<typename Base::V>(d), k, PartialVector{1}));
      }
    return sum;
  }

  template <class Terms> double sum_pq_in_double(int64_t c, Terms terms) const {
    terms.tables = tables;
    const auto padding = this->padding_pass(terms, tables);
    const auto product = [&](const auto& pass, int64_t n, int64_t s) {
      typename Base::V p, q;
      pass.terms(this->row(n, c, s), 0, pass.template coefficients<broadcast_channel<typename Base::V>>(c),
                 PartialVector{1}, p, q);
      return static_cast<double>(first_lane(p)) * static_cast<double>(first_lane(q));
    };
    double sum = 0;
    for (int64_t n = 0; n < problem.N; ++n)
      for (int64_t s = 0; s < problem.S; ++s) {
        if (this->is_valid(n, c, s)) sum += product(terms, n, s);
        else if (options.normalized_padding) sum += product(padding, n, s);
      }
    return sum;
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
