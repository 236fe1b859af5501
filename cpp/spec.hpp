// What a call is but for its arrays: built once for each combination of a convention, axes and an activation.
#pragma once

#include "running.hpp"

namespace batchnorm {

enum class Affine : uint8_t { plain, ignored, abs_eps, gamma_one };
enum class Single : uint8_t { error, clamp, identity, running };

struct Spec {
  uint32_t channel_axes = 0;  // a bit for each axis with statistics of its own
  int64_t group_size = 0;     // that many indices of the first axis have statistics of their own; 0: no groups
  Activation activation = Activation::identity;
  double slope = 0;

  double eps = 0;
  EpsPlacement eps_train = EpsPlacement::inside, eps_eval = EpsPlacement::inside;
  bool refuses_zero_eps = false;
  int correction = 0;  // of the variance that normalizes
  Affine affine = Affine::plain;
  bool normalized_padding = false;

  bool normalizes_by_running = false;  // in training, by the averages that the batch has entered
  bool always_updates = false;         // at inference too
  Single single = Single::clamp;
  bool refuses_masked_single = false;
  Averaging averaging, masked_averaging;

  // The first axis keeps statistics and the next one does not: one batch norm after the other.
  bool has_lanes() const { return group_size && (channel_axes & 1); }

  // The xhat term of dx has a factor that the backward pass cannot tell from rstd: 1 - eps * rstd cancels.
  bool has_xhat_scale() const { return eps_train == EpsPlacement::outside || correction; }
};

// How one call of a Spec normalizes, and what it returns.
enum class Source : uint8_t { batch, running, given };
enum class Returns : uint8_t { output, cache, moments, everything, table, table_alone };

struct Request {
  Source source;     // of the statistics
  bool is_in_place;  // running statistics are advanced where they are, rather than in copies
  Returns returns;

  bool has_output() const { return returns != Returns::moments && returns != Returns::table_alone; }
  bool returns_table() const { return returns >= Returns::table; }
  bool returns_m2() const { return returns == Returns::moments || returns == Returns::everything; }
};

}  // namespace batchnorm
