// The forward pass: moments, and y from these or from given statistics.
#pragma once

#include "driver.hpp"

namespace batchnorm::BATCHNORM_ISA {

template <class T> class ForwardDriver : public Driver<T> {
 public:
  using Base = Driver<T>;
  using typename Base::F;
  using typename Base::Range;
  using typename Base::ChannelSlice;
  using Base::problem, Base::plan, Base::options, Base::tables;

  ForwardDriver(const Problem& problem, const Plan& plan, void* workspace) : Base(problem, plan, workspace) {
    if (!problem.forward.computes_moments) return;
    if (!has_mask_by_channel()) shared_count_ = this->valid_count(0);
    choose_samples();
  }

  void run() {
    const bool has_common_form = !options.has_mask;
    const Activation activation = problem.activation;
    if (has_common_form && activation == Activation::identity && !problem.residual.data) return run<Form::identity>();
    if (has_common_form && activation == Activation::relu)
      return problem.residual.data ? run<Form::relu_residual>() : run<Form::relu>();
    run<Form::general>();
  }

 private:
  template <Form form> void run() {
    Base::for_slices(problem.forward.computes_moments, [&](const ChannelSlice& slice) {
      if (problem.forward.computes_moments) compute_moments(slice);
      else
        this->for_channels(slice, [&](Range range) {
          for (int64_t c = range.begin; c < range.end; ++c) this->fill_tables(c);
        });
      if (problem.forward.y.data) this->map(slice, Normalize<T, form>{{}, options});
    });
  }

  // Computes the moments of the channels, from sums about a value near the mean, or about 0 where such sums are faster.
  // If this value is many standard deviations away from the mean, the sums have cancelled, and they are computed again
  // about the mean that they gave.
  void compute_moments(const ChannelSlice& slice) {
    this->for_channels(slice, [&](Range range) {
      for (int64_t c = range.begin; c < range.end; ++c)
        tables.hi[c] = can_use_dot_ ? 0 : static_cast<F>(shift_near_mean(c));
    });
    for (bool is_repeated = false;; is_repeated = true) {
      reduce_sums(slice, is_repeated);
      this->for_channels(slice, [&](Range range) {
        this->combine_chunks(range);
        finish_moments(range, is_repeated);
      });
      if (is_repeated) return;
      bool has_cancelled_channel = false;
      for (int64_t c = slice.channels.begin; c < slice.channels.end; ++c)
        has_cancelled_channel |= this->needs_recompute[c];
      if (!has_cancelled_channel) return;
    }
  }

  void reduce_sums(const ChannelSlice& slice, bool is_repeated) {
    if constexpr (has_dot<T>)
      if (can_use_dot_ && !is_repeated) return this->reduce(slice, DotTerms<T, false>{});
    Options pass_options = options;
    pass_options.has_frequent_folds = is_repeated && sizeof(F) == 4;  // doubles are not folded into a wider type
    if (options.has_mask) this->reduce(slice, Deviations<T, true>{{}, pass_options});
    else this->reduce(slice, Deviations<T, false>{{}, pass_options});
  }

  // ---- a value near the mean ----

  static constexpr int max_samples = 8;

  bool has_mask_by_channel() const { return problem.mask.bytes.data && problem.mask.bytes.c != 0; }

  // Chooses the offsets of the samples in each channel: pairs at four places, which are inside images if N is a batch
  // of images.
  void choose_samples() {
    if (has_mask_by_channel()) return;
    const int64_t elements = problem.N * problem.S, places = min(4, elements);
    for (int64_t i = 0; i < places; ++i)
      for (int64_t e = i * elements / places + (problem.S / 2) % (elements / places), k = 0; k < 2; ++k, ++e)
        if (e < elements && this->is_valid(e / problem.S, 0, e % problem.S)) add_sample(e);
    for (int64_t e = 0; e < elements && sample_count_ == 0; ++e)
      if (this->is_valid(e / problem.S, 0, e % problem.S)) add_sample(e);
    inverse_sample_count_ = 1.0 / max(sample_count_, 1);
  }

  void add_sample(int64_t e) { samples_[sample_count_++] = e / problem.S * problem.x.n + e % problem.S * problem.x.s; }

  double shift_near_mean(int64_t c) const {
    const T* x = Base::template address_of<const T>(problem.x, 0, c, 0);
    double sum = 0;
    for (int i = 0; i < sample_count_; ++i) sum += load_scalar(x + samples_[i]);
    if (sample_count_) return sum * inverse_sample_count_;
    int found = 0;
    for (int64_t n = 0; has_mask_by_channel() && n < problem.N && found < max_samples; ++n)
      for (int64_t s = 0; s < problem.S && found < max_samples; ++s)
        if (this->is_valid(n, c, s)) sum += load_scalar(x + n * problem.x.n + s * problem.x.s), ++found;
    return found ? sum / found : 0;
  }

  // ---- moments from sums ----

  // Finishes all these channels, or on repetition those whose sums were computed again.
  void finish_moments(Range channels, bool is_repeated) {
    for (int64_t c = channels.begin; c < channels.end; c += Base::channels_at_once)
      finish_moments(c, static_cast<int>(min(Base::channels_at_once, channels.end - c)), is_repeated);
  }

  void finish_moments(int64_t begin, int channels, bool is_repeated) {
    constexpr int size = Base::channels_at_once;
    int64_t count[size] = {};
    double n[size], shift[size] = {}, sum[size] = {}, square[size] = {};
    double delta[size], mean[size], m2[size], mean_error[size], rstd[size], xhat_scale[size];
    for (int i = 0; i < channels; ++i) {
      count[i] = shared_count_ >= 0 ? shared_count_ : this->valid_count(begin + i);
      shift[i] = count[i] ? tables.hi[begin + i] : 0;
      this->totals_of(begin + i, sum[i], square[i]);
    }
    for (int i = 0; i < size; ++i) {
      n[i] = static_cast<double>(max(count[i], 1));
      delta[i] = sum[i] / n[i];
      mean[i] = shift[i] + delta[i];
      m2[i] = square[i] - sum[i] * delta[i];
      const double moved = mean[i] - shift[i];
      mean_error[i] = (shift[i] - (mean[i] - moved)) + (delta[i] - moved);  // rounding errors (two_sum)
    }
    bool is_computed[size];
    for (int i = 0; i < channels; ++i) {
      is_computed[i] = !is_repeated || this->needs_recompute[begin + i];
      if (!is_computed[i]) continue;
      // m2 = square - sum * delta. Let r = delta^2 / var. A relative error e of `square` becomes e * (1 + r) of m2, one
      // of `sum` 2 * e * r of m2 and e * sqrt(r) standard deviations of the mean. With eight samples of independent
      // elements r > 4 occurs once in 10^8 channels, and the rounding errors are as independent: e is then a small part
      // of a unit in the last place. If outliers are among the samples and most terms are equal, the errors of the
      // terms are equal too, and e is some 10 units. m2 is then off by up to 13 * e, which is 1e-5 in float and 1e-13
      // in double (to which chunks add). In the second computation r is 0 and, with frequent folds, e is a unit or two.
      // A limit of 1/4 instead of 4 would bound the error of m2 by 1e-6 for any x, but one ordinary channel in six
      // would need a second computation.
      const bool has_cancelled = sum[i] * delta[i] > 4 * m2[i] && sum[i] - sum[i] == 0;
      if (!is_repeated) this->needs_recompute[begin + i] = has_cancelled;
      // Squares of floats above 1e19 overflow and those below 1e-18 lose digits, although the variance is
      // representable.
      const bool is_tiny = (sum[i] != 0 || square[i] > 0) && square[i] < n[i] * 1e-34;
      if (sizeof(F) == 4 && (is_tiny || !(square[i] - square[i] == 0))) {
        moments_in_double(begin + i, n[i], mean[i], m2[i]);
        mean_error[i] = 0;
      }
    }
    for (int i = 0; i < size; ++i) {
      if (m2[i] < 0) m2[i] = 0;
      const double corrected = n[i] - problem.forward.correction, divisor = corrected < 1 ? 1 : corrected,
                   var = m2[i] / divisor;
      const double std = std_from_var(var, problem.forward.eps, problem.forward.eps_placement);
      // rstd is 0 for a variance of 0 without eps: x - mean is 0 there as well, and 0 is the limit of xhat and of its
      // term in dx.
      rstd[i] = std == 0 ? 0 : 1 / std;
      xhat_scale[i] = n[i] / divisor;
      if (problem.forward.eps_placement == EpsPlacement::outside)
        xhat_scale[i] *= var == 0 ? 0 : std / __builtin_sqrt(var);
    }
    for (int i = 0; i < channels; ++i) {
      if (!is_computed[i]) continue;
      const int64_t c = begin + i;
      const double lo = sizeof(F) == 8 ? mean_error[i] : mean[i] - static_cast<F>(mean[i]) + mean_error[i];
      write_statistic(problem.mean, c, mean[i]);
      write_statistic(problem.mean_lo, c, lo);
      write_statistic(problem.forward.m2, c, m2[i]);
      write_statistic(problem.rstd, c, rstd[i]);
      write_statistic(problem.xhat_scale, c, xhat_scale[i]);
      if (problem.count) set_element<int64_t>(problem.count, c, count[i]);
      this->fill_tables(c, mean[i], lo, rstd[i]);  // with rstd before rounding
    }
  }

  static void write_statistic(void* table, int64_t c, double value) {
    if (table) set_element(table, c, static_cast<F>(with_canonical_nan(value)));
  }

  void moments_in_double(int64_t c, double n, double& mean, double& m2) const {
    const T* x = Base::template address_of<const T>(problem.x, 0, c, 0);
    const auto sum = [&](const auto& term) {
      double sum = 0;
      for (int64_t n = 0; n < problem.N; ++n)
        for (int64_t s = 0; s < problem.S; ++s)
          if (this->is_valid(n, c, s))
            sum += term(static_cast<double>(load_scalar(x + n * problem.x.n + s * problem.x.s)));
      return sum;
    };
    mean = sum([](double x) { return x; }) / n;
    m2 = sum([&](double x) { return (x - mean) * (x - mean); });
  }

  const bool can_use_dot_ = this->can_use_dot();  // if true, the first sums are about 0
  int64_t shared_count_ = -1;                     // the count of all channels; negative if it differs by channel
  int64_t samples_[max_samples];
  int sample_count_ = 0;
  double inverse_sample_count_ = 1;
};

}  // namespace batchnorm::BATCHNORM_ISA
