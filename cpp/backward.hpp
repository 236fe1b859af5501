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
    const bool is_simple = !options.has_mask && problem.dx.data && problem.through_statistics;
    const bool has_residual = problem.residual.data != nullptr, has_dresidual = problem.dresidual.data != nullptr;
    if (is_simple && problem.activation == Activation::identity && !has_dresidual) return run<Form::plain>();
    if (is_simple && problem.activation == Activation::relu && has_residual == has_dresidual)
      return has_residual ? run<Form::relu_residual>() : run<Form::relu>();
    run<Form::general>();
  }

 private:
  template <Form form> void run() {
    const bool has_map = problem.dx.data || problem.dresidual.data;
    Base::run(true, [&](const Scope& scope) {
      const Range mine = scope.team.share(scope.channels.begin, scope.channels.end);
      for (int64_t c = mine.begin; c < mine.end; ++c) this->fill_tables(c);
      scope.team.barrier();
      this->reduce(scope, BackwardTerms<T, form>{{{}, options}});
      scope.team.barrier();
      this->combine(mine);
      for (int64_t c = mine.begin; c < mine.end; ++c) finish(c);
      scope.team.barrier();
      if (has_map) this->map(scope, Gradient<T, form>{{{}, options}});
    });
  }

  // dx = gamma * rstd * (dz - E[dz] - xhat * E[dz * xhat]) = a * (dz - c + b * q), with q = (x - hi) * rstd and
  // xhat = q - rstd * lo.
  void finish(int64_t c) {
    double dbeta, dgamma;
    this->total_of(c, dbeta, dgamma);
    const double rstd = tables.rstd[c], shift = rstd * static_cast<const F*>(problem.mean_lo)[c];
    dgamma -= shift * dbeta;
    write(problem.dgamma, c, dgamma);
    write(problem.dbeta, c, dbeta);
    const double n = static_cast<double>(max(problem.count ? problem.count[c] : problem.N * problem.S, 1));
    const double b = -dgamma / n * read(problem.factor, c, 1);
    tables.a[c] = static_cast<F>(read(problem.gamma, c, 1) * rstd);
    tables.b[c] = static_cast<F>(b);
    tables.c[c] = static_cast<F>(dbeta / n + b * shift);
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
