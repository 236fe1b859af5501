// The running statistics of a call, read from their arrays and updated in place or in copies.
#pragma once

#include <memory>

#include "operands.hpp"

namespace batchnorm {

struct RunningArrays {
  Array mean, spread, steps, weight;

  RunningArrays(nanobind::handle mean, nanobind::handle spread, nanobind::handle steps, nanobind::handle weight,
                bool is_written)
      : mean(mean, is_written), spread(spread, is_written), steps(steps, is_written), weight(weight, is_written) {}

  RunningStatistics values(int64_t C) const {
    RunningStatistics running{per_channel(mean, C), per_channel(spread, C)};
    if (steps) running.steps = scalar(steps);
    if (weight) running.weight = scalar(weight);
    return running;
  }

  void set_scalars(const RunningStatistics& running) const {
    if (steps) set_scalar(steps, running.steps);
    if (weight) set_scalar(weight, running.weight);
  }

 private:
  static double scalar(const Array& array) {
    if (array.element == Element::int64) return static_cast<double>(element_at<int64_t>(array.data, 0));
    return value_at({array.data, array.dtype(), 1}, 0);
  }
  static void set_scalar(const Array& array, double value) {
    if (array.element == Element::int64) set_element(array.data, 0, static_cast<int64_t>(value));
    else set_value({array.data, array.dtype(), 1}, 0, value);
  }
};

// The running statistics of a call. Those of a layer are updated in place; their steps and weight may be absent, and
// the steps an integer. Those of a function are updated in copies; all have one dtype, and scalars have no axes.
class RunningState {
 public:
  RunningState(const Library& library, nanobind::handle tuple, bool is_in_place, const Spec& spec,
               const Operands& operands)
      : library_(library), tuple_(check_tuple(tuple)), is_in_place_(is_in_place),
        running_(require_own(0), require_own(1), require_own(2), require_own(3), is_in_place),
        C_(operands.size_along(spec.channel_axes, true, 0)) {
    for (const Array* array : {&running_.mean, &running_.spread}) {
      if (!*array || !is_float32_or_float64(*array)) decline(Refusal::state);
      check_by_channel(*array, operands.x, spec.channel_axes);
    }
    const Averaging& averaging = spec.averaging;
    const bool needs_weight = averaging.debias == Debias::adam || averaging.debias == Debias::weight_sum;
    const bool needs_steps = averaging.is_cumulative || averaging.debias == Debias::first_batch;
    check_scalar(running_.steps, needs_steps);
    check_scalar(running_.weight, needs_weight);
    if (!is_in_place) check_scalar(Array(require_own(4)), true);
    running_.values(C_);  // declines unless they are contiguous
  }

  // Updates the averages by a batch. If the update is accepted and is not in place, `copies` becomes the result.
  UpdateOutcome advance(const BatchMoments& batch, const Averaging& averaging, nanobind::object& copies) {
    std::unique_ptr<RunningArrays> updated_arrays;
    nanobind::object new_arrays[4];
    if (!is_in_place_) {
      const Array* const arrays[] = {&running_.mean, &running_.spread, &running_.steps, &running_.weight};
      for (int i = 0; i < 4; ++i) new_arrays[i] = library_.empty_like(require_own(i), *arrays[i]);
      updated_arrays.reset(new RunningArrays(new_arrays[0], new_arrays[1], new_arrays[2], new_arrays[3], true));
    }
    const RunningArrays& target = updated_arrays ? *updated_arrays : running_;
    RunningStatistics updated = target.values(C_);
    const UpdateOutcome outcome = batchnorm::advance(running_.values(C_), updated, batch, averaging, C_);
    if (outcome != UpdateOutcome::accepted) return outcome;
    target.set_scalars(updated);
    if (updated_arrays) copies = nanobind::make_tuple(new_arrays[0], new_arrays[1], new_arrays[2], new_arrays[3]);
    updated_ = std::move(updated_arrays);
    return outcome;
  }

  // The running statistics, after the update if there has been one.
  RunningStatistics current() const { return (updated_ ? *updated_ : running_).values(C_); }

 private:
  static nanobind::handle check_tuple(nanobind::handle tuple) {
    if (!PyTuple_Check(tuple.ptr()) || NB_TUPLE_GET_SIZE(tuple.ptr()) < 5) decline(Refusal::state);
    return tuple;
  }
  nanobind::handle require_own(int i) const { return library_.require_own(tuple_, i); }

  static bool is_float32_or_float64(const Array& array) {
    return array.element == Element::float32 || array.element == Element::float64;
  }

  void check_scalar(const Array& array, bool is_needed) const {
    if (!array && is_in_place_ && !is_needed) return;
    const bool fits = !array ? false
                      : is_in_place_
                          ? array.size() == 1 && (is_float32_or_float64(array) || array.element == Element::int64)
                          : array.ndim == 0 && array.element == running_.mean.element;
    if (!fits || (!is_in_place_ && running_.spread.element != running_.mean.element)) decline(Refusal::state);
  }

  const Library& library_;
  nanobind::handle tuple_;
  bool is_in_place_;
  RunningArrays running_;
  int64_t C_;
  std::unique_ptr<RunningArrays> updated_;
};

}  // namespace batchnorm
