#include "running.hpp"

#include <algorithm>
#include <cmath>

namespace batchnorm {
namespace {

// `value` as the array would hold it.
double rounded(const Channels& values, double value) {
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
  if (!(divisor > 0)) return NAN;  // one element has no such variance
  if (!averaging.corrects_tracked) return tracked_value(m2 / divisor, averaging);
  return tracked_value(m2 / std::max(count, 1.0), averaging) * (count / divisor);
}

// 1/0 is infinity here: x is another than the one that the averages are of.
double rstd_of_spread(double spread, const Averaging& averaging, EpsPlacement placement) {
  const bool is_inside = placement == EpsPlacement::inside;
  switch (averaging.tracked) {
    case Tracked::rstd: return spread;
    case Tracked::var:
    case Tracked::var_eps: return 1 / std_of_var(spread, averaging.eps, placement);
    case Tracked::log10_std: spread = std::pow(10, spread); break;
    case Tracked::std:
    case Tracked::std_eps: break;
  }
  if (is_inside) return 1 / std_of_var(spread * spread, averaging.eps, placement);
  return 1 / (spread + (placement == EpsPlacement::outside ? averaging.eps : 0));
}

}  // namespace

double value_at(const Channels& values, int64_t c) {
  const int64_t i = c * values.stride;
  return values.dtype == Dtype::float64 ? element_at<double>(values.data, i) : element_at<float>(values.data, i);
}

void set_value(const Channels& values, int64_t c, double value) {
  const int64_t i = c * values.stride;
  if (values.dtype == Dtype::float64) set_element(values.data, i, value);
  else set_element(values.data, i, static_cast<float>(value));
}

void MergedMoments::merge(const Batch& other, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    const double own = static_cast<double>(count[c]), n = static_cast<double>(other.count_of(c));
    if (n == 0) continue;
    const double delta = value_at(other.mean, c) - mean[c] + value_at(other.mean_lo, c), weight = n / (own + n);
    mean[c] = own == 0 ? value_at(other.mean, c) + value_at(other.mean_lo, c) : mean[c] + delta * weight;
    m2[c] += value_at(other.m2, c) + (own == 0 ? 0 : delta * delta * own * weight);
    count[c] += other.count_of(c);
  }
}

// In double, and rounded once: three roundings of rstd would be half of what y may be off.
void statistics_of(const Running& running, const Averaging& averaging, EpsPlacement placement,
                   const StatisticsRows& rows, int64_t C) {
  const bool is_weighted = averaging.debias == Debias::adam || averaging.debias == Debias::weight_sum;
  const double weight = is_weighted && running.weight != 0 ? running.weight : 1;
  for (int64_t c = 0; c < C; ++c) {
    const double mean = value_at(running.mean, c) / weight, spread = value_at(running.spread, c) / weight;
    set_value(rows.mean, c, mean);
    set_value(rows.mean_lo, c, mean - value_at(rows.mean, c));
    set_value(rows.rstd, c, rstd_of_spread(spread, averaging, placement));
  }
}

Entry advance(const Running& running, Running& updated, const Batch& batch, const Averaging& averaging, int64_t C) {
  const auto count = [&](int64_t c) { return batch.count_of(c); };
  const auto enters = [&](int64_t c) { return count(c) > (averaging.needs_two ? 1 : 0); };
  const auto mean = [&](int64_t c) {
    return rounded(running.mean, value_at(batch.mean, c) + value_at(batch.mean_lo, c));
  };
  const auto spread = [&](int64_t c) {
    return rounded(running.spread, spread_of(value_at(batch.m2, c), static_cast<double>(count(c)), averaging));
  };
  bool is_any = false;
  for (int64_t c = 0; c < C; ++c) {
    if (!enters(c)) continue;
    if (!std::isfinite(mean(c)) || !std::isfinite(spread(c))) return Entry::refused;
    is_any = true;
  }
  if (!is_any) return Entry::empty;

  const bool is_sum = averaging.debias == Debias::weight_sum, is_first = averaging.debias == Debias::first_batch;
  const bool is_weighted = averaging.debias == Debias::adam || is_sum;
  const double weight = is_weighted && running.weight != 0 ? running.weight : 1;
  const double momentum = averaging.is_cumulative ? 1 / (running.steps + 1) : averaging.momentum;
  const auto average = [&](double old, double value) {
    if (is_sum) return (1 - momentum) * old + value;
    if (momentum == 1 || (is_first && running.steps == 0)) return value;  // exactly, whatever the old value was
    return old + momentum * (value - old);
  };
  for (int64_t c = 0; c < C; ++c) {
    const double old_mean = value_at(running.mean, c), old_spread = value_at(running.spread, c);
    set_value(updated.mean, c, average(old_mean, enters(c) ? mean(c) : old_mean / weight));
    set_value(updated.spread, c, average(old_spread, enters(c) ? spread(c) : old_spread / weight));
  }
  updated.weight = average(running.weight, 1);
  updated.steps = running.steps + 1;
  return Entry::accepted;
}

}  // namespace batchnorm
