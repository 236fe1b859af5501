// Running statistics, and how a batch enters them, in every convention. The formulas are those of core/running.py.
#pragma once

#include "problem.hpp"

namespace batchnorm {

enum class Tracked : uint8_t { var, std, std_eps, rstd, var_eps, log10_std };
enum class Debias : uint8_t { none, adam, weight_sum, first_batch };

// What a convention makes of a batch.
struct Averaging {
  Tracked tracked = Tracked::var;
  Debias debias = Debias::none;
  int correction = 0;             // c of the divisor count - c
  bool corrects_tracked = false;  // by the factor count / (count - c), in place of the variance by its divisor
  bool is_clamped = false;        // count - c is at least 1
  bool needs_two = false;         // a channel with one element keeps its averages
  bool is_cumulative = false;     // the momentum is 1 / (steps + 1)
  double momentum = 0;            // weight of the batch
  double eps = 0;                 // in the tracked quantity
};

// The moments of a batch, each float or double.
struct Batch {
  Channels mean, mean_lo, m2;
  const int64_t* count = nullptr;  // for each channel; null: `shared_count` for all
  int64_t shared_count = 0;
};

// The averages, each float or double.
struct Running {
  Channels mean, spread;
  double steps = 0, weight = 1;
};

enum class Entry : uint8_t { accepted, empty, refused };

// Advances the averages by a batch. One whose statistics are not finite, as the averages hold them, is refused as a whole;
// one without elements is empty. Neither changes anything.
Entry advance(Running& running, const Batch& batch, const Averaging& averaging, int64_t C);

// Element c, float or double.
double value_at(const Channels& values, int64_t c);
void set_value(const Channels& values, int64_t c, double value);

}  // namespace batchnorm
