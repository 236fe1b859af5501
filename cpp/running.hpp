// Running statistics and their update by a batch, in every convention. The formulas are those of core/running.py.
#pragma once

#include "problem.hpp"

namespace batchnorm {

enum class Tracked : uint8_t { var, std, std_eps, rstd, var_eps, log10_std };
enum class Debias : uint8_t { none, adam, weight_sum, first_batch };

// A convention's rule for the update.
struct Averaging {
  Tracked tracked = Tracked::var;
  Debias debias = Debias::none;
  int correction = 0;  // the c of the divisor count - c
  bool corrects_tracked =
      false;  // multiplies the tracked quantity by count / (count - c) instead of dividing m2 by count - c
  bool is_clamped = false;     // count - c is clamped to at least 1
  bool needs_two = false;      // a channel with one element does not update its averages
  bool is_cumulative = false;  // the momentum is 1 / (steps + 1)
  double momentum = 0;         // weight of the batch
  double eps = 0;              // of the tracked quantity
};

// The moments of a batch, each float or double.
struct BatchMoments {
  PerChannel mean, mean_lo, m2;
  const int64_t* count = nullptr;  // for each channel; null: `shared_count` for all
  int64_t shared_count = 0;

  int64_t count_of(int64_t c) const { return count ? count[c] : shared_count; }
};

// The running averages, each float or double.
struct RunningStatistics {
  PerChannel mean, spread;
  double steps = 0, weight = 1;
};

// The merged moments of several samples, in double; one number of each kind for each channel.
struct MergedMoments {
  double *mean, *m2;
  int64_t* count;

  void merge(const BatchMoments& other, int64_t C);  // Chan, Golub & LeVeque 1983
};

enum class UpdateOutcome : uint8_t { accepted, empty, refused };

// Writes the averages after one more batch to `updated`, which may be `running` itself. A batch whose statistics are
// not finite in the dtype of the averages is refused as a whole; a batch without elements is empty. In both cases
// nothing is written.
UpdateOutcome advance(const RunningStatistics& running, RunningStatistics& updated, const BatchMoments& batch,
                      const Averaging& averaging, int64_t C);

// Computes the statistics that normalize by the averages: the rounded mean, its rounding error mean_lo, and rstd, for
// each of C channels.
struct NormalizingStatistics { PerChannel mean, mean_lo, rstd; };
void fill_statistics(const RunningStatistics& running, const Averaging& averaging, EpsPlacement placement,
                     const NormalizingStatistics& statistics, int64_t C);

// Element c, float or double.
double value_at(const PerChannel& values, int64_t c);
void set_value(const PerChannel& values, int64_t c, double value);

}  // namespace batchnorm
