#include "running.hpp"

#include <algorithm>
#include <cmath>

namespace batchnorm {
namespace {

// `value` rounded to the dtype of the array.
double rounded(const PerChannel& values, double value) {
  return values.dtype == Dtype::float64 ? value : static_cast<float>(value);
}

double tracked_value(double var, const Averaging& averaging) {
  switch (averaging.tracked) {
    case Tracked::var: return var;
    case Tracked::std: return std::sqrt(var);
    case Tracked::std_eps: return std::sqrt(var + averaging.eps);
    case Tracked::rstd: return 1 / std::sqrt(var + averaging.eps);
    case Tracked::var_eps: return var + averaging.eps;
    case Tracked::log10_std: return 0.5 * std::log10(var);
  }
  return NAN;
}

double spread_of(double m2, double count, const Averaging& averaging) {
  double divisor = count - averaging.correction;
  if (averaging.is_clamped) divisor = std::max(divisor, 1.0);
  if (!(divisor > 0)) return NAN;  // undefined for one element
  if (!averaging.corrects_tracked) return tracked_value(m2 / divisor, averaging);
  return tracked_value(m2 / std::max(count, 1.0), averaging) * (count / divisor);
}

// A spread of 0 gives infinity here, unlike in a batch, because x is not the sample of which these are the statistics.
double rstd_of_spread(double spread, const Averaging& averaging, EpsPlacement placement) {
  const bool is_inside = placement == EpsPlacement::inside;
  switch (averaging.tracked) {
    case Tracked::rstd: return spread;
    case Tracked::var:
    case Tracked::var_eps: return 1 / std_from_var(spread, averaging.eps, placement);
    case Tracked::log10_std: spread = std::pow(10, spread); break;
    case Tracked::std:
    case Tracked::std_eps: break;
  }
  if (is_inside) return 1 / std_from_var(spread * spread, averaging.eps, placement);
  return 1 / (spread + (placement == EpsPlacement::outside ? averaging.eps : 0));
}

}  // namespace

double value_at(const PerChannel& values, int64_t c) {
  const int64_t i = c * values.stride;
  return values.dtype == Dtype::float64 ? element_at<double>(values.data, i) : element_at<float>(values.data, i);
}

void set_value(const PerChannel& values, int64_t c, double value) {
  const int64_t i = c * values.stride;
  if (values.dtype == Dtype::float64) set_element(values.data, i, value);
  else set_element(values.data, i, static_cast<float>(value));
}

void MergedMoments::merge(const BatchMoments& other, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    const double n_a = static_cast<double>(count[c]), n_b = static_cast<double>(other.count_of(c));
    if (n_b == 0) continue;
    const double delta = value_at(other.mean, c) - mean[c] + value_at(other.mean_lo, c), weight = n_b / (n_a + n_b);
    mean[c] = n_a == 0 ? value_at(other.mean, c) + value_at(other.mean_lo, c) : mean[c] + delta * weight;
    m2[c] += value_at(other.m2, c) + (n_a == 0 ? 0 : delta * delta * n_a * weight);
    count[c] += other.count_of(c);
  }
}

// In double and rounded once: three roundings of rstd would use up half of the error budget of y.
void fill_statistics(const RunningStatistics& running, const Averaging& averaging, EpsPlacement placement,
                     const NormalizingStatistics& statistics, int64_t C) {
  const bool is_weighted = averaging.debias == Debias::adam || averaging.debias == Debias::weight_sum;
  const double weight = is_weighted && running.weight != 0 ? running.weight : 1;
  for (int64_t c = 0; c < C; ++c) {
    const double mean = value_at(running.mean, c) / weight, spread = value_at(running.spread, c) / weight;
    set_value(statistics.mean, c, mean);
    set_value(statistics.mean_lo, c, mean - value_at(statistics.mean, c));
    set_value(statistics.rstd, c, rstd_of_spread(spread, averaging, placement));
  }
}

UpdateOutcome advance(const RunningStatistics& running, RunningStatistics& updated, const BatchMoments& batch,
                      const Averaging& averaging, int64_t C) {
  const auto count = [&](int64_t c) { return batch.count_of(c); };
  const auto is_updated = [&](int64_t c) { return count(c) > (averaging.needs_two ? 1 : 0); };
  const auto mean = [&](int64_t c) {
    return rounded(running.mean, value_at(batch.mean, c) + value_at(batch.mean_lo, c));
  };
  const auto spread = [&](int64_t c) {
    return rounded(running.spread, spread_of(value_at(batch.m2, c), static_cast<double>(count(c)), averaging));
  };
  bool has_update = false;
  for (int64_t c = 0; c < C; ++c) {
    if (!is_updated(c)) continue;
    if (!std::isfinite(mean(c)) || !std::isfinite(spread(c))) return UpdateOutcome::refused;
    has_update = true;
  }
  if (!has_update) return UpdateOutcome::empty;

  const bool is_sum = averaging.debias == Debias::weight_sum, is_first = averaging.debias == Debias::first_batch;
  const bool is_weighted = averaging.debias == Debias::adam || is_sum;
  const double weight = is_weighted && running.weight != 0 ? running.weight : 1;
  const double momentum = averaging.is_cumulative ? 1 / (running.steps + 1) : averaging.momentum;
  const auto average = [&](double old, double value) {
    if (is_sum) return (1 - momentum) * old + value;
    if (momentum == 1 || (is_first && running.steps == 0)) return value;  // exact, for any old value
    return old + momentum * (value - old);
  };
  for (int64_t c = 0; c < C; ++c) {
    const double old_mean = value_at(running.mean, c), old_spread = value_at(running.spread, c);
    set_value(updated.mean, c, average(old_mean, is_updated(c) ? mean(c) : old_mean / weight));
    set_value(updated.spread, c, average(old_spread, is_updated(c) ? spread(c) : old_spread / weight));
  }
  updated.weight = average(running.weight, 1);
  updated.steps = running.steps + 1;
  return UpdateOutcome::accepted;
}

}  // namespace batchnorm
