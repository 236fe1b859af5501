// The static part of a call, without its arrays. Built once for each combination of a convention, axes and an
// activation.
#pragma once

#include "running.hpp"

namespace batchnorm {

enum class Affine : uint8_t { plain, ignored, abs_eps, gamma_one };
enum class Single : uint8_t { error, clamp, identity, running };

struct Spec {
  uint32_t channel_axes = 0;  // a bit for each axis along which statistics are separate
  int64_t group_size = 0;     // each group of this many indices of the first axis has its own statistics; 0: no groups
  Activation activation = Activation::identity;
  double slope = 0;

  double eps = 0;
  EpsPlacement eps_train = EpsPlacement::inside, eps_eval = EpsPlacement::inside;
  bool refuses_zero_eps = false;
  int correction = 0;  // of the variance by which x is normalized
  Affine affine = Affine::plain;
  bool normalized_padding = false;

  bool normalizes_by_running = false;  // in training x is normalized by the averages, after their update
  bool always_updates = false;         // also at inference
  Single single = Single::clamp;
  bool refuses_masked_single = false;
  Averaging averaging, masked_averaging;

  // True if the first axis is a channel axis and the next one is not: the lanes, indices of the first axis, are
  // independent batch norms.
  bool has_lanes() const { return group_size && (channel_axes & 1); }

  // True if the xhat term of dx has a factor that the backward pass cannot derive from rstd, because 1 - eps * rstd
  // cancels.
  bool has_xhat_scale() const { return eps_train == EpsPlacement::outside || correction; }
};

// The source of the statistics in one call of a Spec, and the results of the call.
enum class Source : uint8_t { batch, running, given };
enum class Returns : uint8_t { output, cache, moments, everything, table, table_alone };

struct Request {
  Source source;     // the source of the statistics that normalize
  bool is_in_place;  // running statistics are updated in place instead of in copies
  Returns returns;

  bool has_output() const { return returns != Returns::moments && returns != Returns::table_alone; }
  bool returns_table() const { return returns >= Returns::table; }
  bool returns_m2() const { return returns == Returns::moments || returns == Returns::everything; }
};

}  // namespace batchnorm
