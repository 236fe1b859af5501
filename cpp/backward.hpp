// The gradients of forward, from x, dy and the statistics that normalised.
#pragma once

#include "job.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class T> class BackwardJob : public Job<T> {
 public:
  using Base = Job<T>;
  using typename Base::F;
  using typename Base::Range;
  using typename Base::Scope;
  using Base::Base;
  using Base::problem, Base::plan, Base::options, Base::tables;

  void run() {
    const bool is_simple = !options.has_mask && problem.backward.dx.data && problem.backward.through_statistics;
    const bool has_residual = problem.residual.data != nullptr,
               has_dresidual = problem.backward.dresidual.data != nullptr;
    if (is_simple && problem.activation == Activation::identity && !has_dresidual) return run<Form::plain>();
    if (is_simple && problem.activation == Activation::relu && has_residual == has_dresidual)
      return has_residual ? run<Form::relu_residual>() : run<Form::relu>();
    run<Form::general>();
  }

 private:
  template <Form form> void run() {
    const bool has_map = problem.backward.dx.data || problem.backward.dresidual.data;
    const bool are_dots = form == Form::plain && this->can_dot() && !options.normalized_padding &&
                          problem.N * problem.S > 1 && is_near_zero();
    Base::run(true, [&](const Scope& scope) {
      this->for_channels(scope, [&](Range mine) {
        for (int64_t c = mine.begin; c < mine.end; ++c) this->fill_tables(c);
      });
      const BackwardTerms<T, form> terms{{{}, options}};
      if (are_dots) take_dots(scope);
      else this->reduce(scope, terms);
      this->for_channels(scope, [&](Range mine) {
        this->combine(mine);
        for (int64_t c = mine.begin; c < mine.end; ++c) finish(c, terms, are_dots);
      });
      if (are_dots) map_folded(scope);
      else if (has_map) this->map(scope, Gradient<T, form>{{{}, options}});
    });
  }

  void take_dots(const Scope& scope) const {
    if constexpr (has_dots<T>) this->reduce(scope, Dots<T, true>{});
  }

  void map_folded(const Scope& scope) const {
    if constexpr (has_dots<T>) this->map(scope, FoldedGradient<T>{});
  }

  // Whether sums of dy * x do not cancel, as no mean lies far from zero, and coefficients of x stay in the range of floats.
  // Of all channels: which of them a thread takes together must not decide.
  bool is_near_zero() const {
    for (int64_t c = 0; c < problem.C; ++c) {
      const F mean = element_at<F>(problem.mean, c), rstd = element_at<F>(problem.rstd, c);
      if (!(__builtin_fabs(mean * rstd) < 4 && rstd > 1e-3 && rstd < 1e3)) return false;
    }
    return true;
  }

  // dx = gamma * rstd * (dz - E[dz] - xhat * E[dz * xhat]) = a * (dz - c + b * d), with d = x - hi and
  // xhat = rstd * (d - lo); about zero multiplied out, a * dy + b * x + c.
  template <class Terms> void finish(int64_t c, const Terms& terms, bool is_about_zero) {
    const double rstd = element_at<F>(problem.rstd, c), lo = element_at<F>(problem.mean_lo, c);
    const double n =
        static_cast<double>(max(problem.count ? element_at<int64_t>(problem.count, c) : problem.N * problem.S, 1));
    const double factor = problem.factor ? element_at<F>(problem.factor, c) : 1;
    double dbeta, product;
    this->total_of(c, dbeta, product);
    if (is_about_zero) product -= tables.hi[c] * dbeta;
    // Products of floats can leave their range though the gradient does not.
    const bool is_tiny = product != 0 || (dbeta != 0 && __builtin_fabs(dbeta) < n * 1e-16);
    const bool is_out_of_range = !(product - product == 0) || (is_tiny && __builtin_fabs(product) < n * 1e-32);
    if (sizeof(F) == 4 && is_out_of_range) product = product_in_double(c, terms);
    const double dgamma = rstd * (product - lo * dbeta), b = -dgamma / n * rstd * factor;
    write(problem.backward.dgamma, c, with_one_nan(dgamma));
    write(problem.backward.dbeta, c, with_one_nan(dbeta + unread_in_double(c, terms)));
    const double a = read(problem.gamma, c, 1) * rstd, shift = dbeta / n + b * lo;
    tables.a[c] = static_cast<F>(with_one_nan(a));
    tables.b[c] = static_cast<F>(with_one_nan(is_about_zero ? a * b : b));
    tables.c[c] = static_cast<F>(with_one_nan(is_about_zero ? -a * (shift + b * tables.hi[c]) : shift));
  }

  // The sum of dz over padding that is not finite, where any is: its y = activation(beta + residual) depends on beta alone.
  template <class Terms> double unread_in_double(int64_t c, const Terms& terms) const {
    if (!__atomic_load_n(options.has_unread, __ATOMIC_RELAXED)) return 0;
    const auto padding = this->padding_of(terms, tables);
    const auto k = padding.template coefficients<by_channel<typename Base::V>>(c);
    const T* x = Base::template at<const T>(problem.x, 0, c, 0);
    double sum = 0;
    for (int64_t n = 0; n < problem.N; ++n)
      for (int64_t s = 0; s < problem.S; ++s) {
        const F d = static_cast<F>(scalar(x + n * problem.x.n + s * problem.x.s)) - tables.hi[c];
        if (this->counts(n, c, s) || d - d == 0) continue;
        sum += first_lane(padding.dz(this->row(n, c, s), 0, broadcast<typename Base::V>(d), k, First{1}));
      }
    return sum;
  }

  template <class Terms> double product_in_double(int64_t c, Terms terms) const {
    terms.tables = tables;
    const auto padding = this->padding_of(terms, tables);
    const auto of = [&](const auto& pass, int64_t n, int64_t s) {
      typename Base::V p, q;
      pass.terms(this->row(n, c, s), 0, pass.template coefficients<by_channel<typename Base::V>>(c), First{1}, p, q);
      return static_cast<double>(first_lane(p)) * static_cast<double>(first_lane(q));
    };
    double sum = 0;
    for (int64_t n = 0; n < problem.N; ++n)
      for (int64_t s = 0; s < problem.S; ++s) {
        if (this->counts(n, c, s)) sum += of(terms, n, s);
        else if (options.normalized_padding) sum += of(padding, n, s);
      }
    return sum;
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
