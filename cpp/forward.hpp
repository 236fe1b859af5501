// Moments, and y from them or from given statistics.
#pragma once

#include "job.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class T> class ForwardJob : public Job<T> {
 public:
  using Base = Job<T>;
  using typename Base::F;
  using typename Base::Range;
  using typename Base::Scope;
  using Base::problem, Base::plan, Base::options, Base::tables;

  ForwardJob(const Problem& problem, const Plan& plan, void* workspace) : Base(problem, plan, workspace) {
    if (!problem.measure) return;
    if (!has_mask_by_channel()) shared_count_ = this->count_of(0);
    choose_samples();
  }

  void run() {
    const bool is_simple = !options.has_mask && !options.normalized_padding;
    const Activation activation = problem.activation;
    if (is_simple && activation == Activation::identity && !problem.residual.data) return run<Form::plain>();
    if (is_simple && activation == Activation::relu)
      return problem.residual.data ? run<Form::relu_residual>() : run<Form::relu>();
    run<Form::general>();
  }

 private:
  template <Form form> void run() {
    Base::run(problem.measure, [&](const Scope& scope) {
      const Range mine = scope.team.share(scope.channels.begin, scope.channels.end);
      if (problem.measure) measure(scope);
      else for (int64_t c = mine.begin; c < mine.end; ++c) this->fill_tables(c);
      if (!problem.y.data) return;
      scope.team.barrier();
      this->map(scope, Forward<T, form>{{}, options});
    });
  }

  // The moments of the channels, by sums about a value near the mean, or about 0 where those are faster. Where that
  // value turns out to lie many deviations away the sums have cancelled, and are taken again about the mean they gave.
  void measure(const Scope& scope) {
    const Range mine = scope.team.share(scope.channels.begin, scope.channels.end);
    for (int64_t c = mine.begin; c < mine.end; ++c) tables.hi[c] = can_dot_ ? 0 : static_cast<F>(value_near_mean(c));
    for (bool is_repeated = false;; is_repeated = true) {
      scope.team.barrier();
      take_sums(scope, is_repeated);
      scope.team.barrier();
      this->combine(mine);
      for (int64_t c = mine.begin; c < mine.end; ++c)
        if (!is_repeated || this->again[c]) finish_moments(c, is_repeated);
      scope.team.barrier();
      if (is_repeated) return;
      bool is_any = false;
      for (int64_t c = scope.channels.begin; c < scope.channels.end; ++c) is_any |= this->again[c];
      if (!is_any) return;
    }
  }

  void take_sums(const Scope& scope, bool is_repeated) {
    if constexpr (has_dots<T>)
      if (can_dot_ && !is_repeated) return this->reduce(scope, Dots<T, false>{});
    if (options.has_mask) this->reduce(scope, Deviations<T, true>{{}, options});
    else this->reduce(scope, Deviations<T, false>{{}, options});
  }

  // ---- a value near the mean ----

  static constexpr int most_samples = 8;

  bool has_mask_by_channel() const { return problem.mask.keep.data && problem.mask.keep.c != 0; }

  // Offsets of the samples in each channel: pairs from four places, in the middle of an image where N is batch.
  void choose_samples() {
    if (has_mask_by_channel()) return;
    const int64_t elements = problem.N * problem.S, places = min(4, elements);
    for (int64_t i = 0; i < places; ++i)
      for (int64_t e = i * elements / places + (problem.S / 2) % (elements / places), k = 0; k < 2; ++k, ++e)
        if (e < elements && this->counts(e / problem.S, 0, e % problem.S)) add_sample(e);
    for (int64_t e = 0; e < elements && sample_count_ == 0; ++e)
      if (this->counts(e / problem.S, 0, e % problem.S)) add_sample(e);
  }

  void add_sample(int64_t e) {
    samples_[sample_count_++] = e / problem.S * problem.x.n + e % problem.S * problem.x.s;
  }

  double value_near_mean(int64_t c) const {
    const T* x = Base::template at<const T>(problem.x, 0, c, 0);
    double sum = 0;
    for (int i = 0; i < sample_count_; ++i) sum += scalar(x + samples_[i]);
    if (sample_count_) return sum / sample_count_;
    int found = 0;
    for (int64_t n = 0; has_mask_by_channel() && n < problem.N && found < most_samples; ++n)
      for (int64_t s = 0; s < problem.S && found < most_samples; ++s)
        if (this->counts(n, c, s)) sum += scalar(x + n * problem.x.n + s * problem.x.s), ++found;
    return found ? sum / found : 0;
  }

  // ---- moments from sums ----

  void finish_moments(int64_t c, bool is_repeated) {
    const int64_t count = shared_count_ >= 0 ? shared_count_ : this->count_of(c);
    double sum, square;
    this->total_of(c, sum, square);
    const double n = static_cast<double>(max(count, 1)), shift = count ? tables.hi[c] : 0, delta = sum / n;
    double mean = shift + delta, m2 = square - sum * delta;
    double rest = (shift - (mean - (mean - shift))) + (delta - (mean - shift));  // what rounding took (two_sum)
    const bool has_cancelled = sum * delta > 4 * m2 && sum - sum == 0;
    this->again[c] = has_cancelled && !is_repeated;
    // Squares of floats beyond 1e19 overflow, and those below 1e-18 lose digits, though the variance is a float.
    const bool is_tiny = (sum != 0 || square > 0) && square < n * 1e-34;
    if (sizeof(F) == 4 && (is_tiny || !(square - square == 0))) {
      measure_in_double(c, n, mean, m2);
      rest = 0;
    }
    if (m2 < 0) m2 = 0;
    const double divisor = n - problem.correction, rstd = rstd_of(m2 / (divisor < 1 ? 1 : divisor));
    const double lo = sizeof(F) == 8 ? rest : mean - static_cast<F>(mean) + rest;
    set(problem.mean, c, mean);
    set(problem.mean_lo, c, lo);
    set(problem.m2, c, m2);
    set(problem.rstd, c, rstd);
    if (problem.count) problem.count[c] = count;
    this->fill_tables(c, mean, lo, rstd);  // by rstd before it is rounded
  }

  static void set(void* table, int64_t c, double value) {
    if (table) static_cast<F*>(table)[c] = static_cast<F>(value);
  }

  // 0 where the deviation is 0: x - mean is 0 as well there, and 0 is the limit of xhat.
  double rstd_of(double var) const {
    const bool is_inside = problem.eps_placement == EpsPlacement::inside;
    double std = __builtin_sqrt(is_inside ? var + problem.eps : var);
    if (problem.eps_placement == EpsPlacement::outside) std += problem.eps;
    return std == 0 ? 0 : 1 / std;
  }

  void measure_in_double(int64_t c, double n, double& mean, double& m2) const {
    const T* x = Base::template at<const T>(problem.x, 0, c, 0);
    const auto sum = [&](const auto& term) {
      double sum = 0;
      for (int64_t n = 0; n < problem.N; ++n)
        for (int64_t s = 0; s < problem.S; ++s)
          if (this->counts(n, c, s)) sum += term(static_cast<double>(scalar(x + n * problem.x.n + s * problem.x.s)));
      return sum;
    };
    mean = sum([](double x) { return x; }) / n;
    m2 = sum([&](double x) { return (x - mean) * (x - mean); });
  }

  const bool can_dot_ = this->can_dot();  // then the first sums are about 0
  int64_t shared_count_ = -1;  // where every channel has the same
  int64_t samples_[most_samples];
  int sample_count_ = 0;
};

}  // namespace batchnorm::BATCHNORM_ISA
