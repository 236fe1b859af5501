// The running statistics of a call.
#pragma once

#include <memory>

#include "operands.hpp"

namespace batchnorm {

struct Averages {
  Array mean, spread, steps, weight;

  Averages(nanobind::handle mean, nanobind::handle spread, nanobind::handle steps, nanobind::handle weight,
           bool is_written)
      : mean(mean, is_written), spread(spread, is_written), steps(steps, is_written), weight(weight, is_written) {}

  Running values(int64_t C) const {
    Running running{channels(mean, C), channels(spread, C)};
    if (steps) running.steps = number(steps);
    if (weight) running.weight = number(weight);
    return running;
  }

  void set_scalars(const Running& running) const {
    if (steps) set_number(steps, running.steps);
    if (weight) set_number(weight, running.weight);
  }

 private:
  static double number(const Array& array) {
    if (array.element == Element::int64) return static_cast<double>(element_at<int64_t>(array.data, 0));
    return value_at({array.data, array.dtype(), 1}, 0);
  }
  static void set_number(const Array& array, double value) {
    if (array.element == Element::int64) set_element(array.data, 0, static_cast<int64_t>(value));
    else set_value({array.data, array.dtype(), 1}, 0, value);
  }
};

// The running statistics of a call: those of a layer, advanced in place, whose steps and weight may be absent and the
// steps an integer; or those of a function, all of one dtype with scalars without axes, advanced in copies.
class State {
 public:
  State(const Library& library, nanobind::handle tuple, bool is_in_place, const Spec& spec, const Operands& operands)
      : library_(library), tuple_(checked(tuple)), is_in_place_(is_in_place),
        old_(own(0), own(1), own(2), own(3), is_in_place), C_(operands.size_along(spec.channel_axes, true, 0)) {
    for (const Array* array : {&old_.mean, &old_.spread}) {
      if (!*array || !is_wide(*array)) decline(Refusal::state);
      check_by_channel(*array, operands.x, spec.channel_axes);
    }
    const Averaging& averaging = spec.averaging;
    const bool needs_weight = averaging.debias == Debias::adam || averaging.debias == Debias::weight_sum;
    const bool needs_steps = averaging.is_cumulative || averaging.debias == Debias::first_batch;
    check_scalar(old_.steps, needs_steps);
    check_scalar(old_.weight, needs_weight);
    if (!is_in_place) check_scalar(Array(own(4)), true);
    old_.values(C_);  // raises where they are not contiguous
  }

  // By a batch, `copies` being the result where it is accepted and they are not advanced in place.
  Entry advance(const Batch& batch, const Averaging& averaging, nanobind::object& copies) {
    std::unique_ptr<Averages> made;
    nanobind::object copied[4];
    if (!is_in_place_) {
      const Array* const arrays[] = {&old_.mean, &old_.spread, &old_.steps, &old_.weight};
      for (int i = 0; i < 4; ++i) copied[i] = library_.like(own(i), *arrays[i]);
      made.reset(new Averages(copied[0], copied[1], copied[2], copied[3], true));
    }
    const Averages& target = made ? *made : old_;
    Running updated = target.values(C_);
    const Entry entry = batchnorm::advance(old_.values(C_), updated, batch, averaging, C_);
    if (entry != Entry::accepted) return entry;
    target.set_scalars(updated);
    if (made) copies = nanobind::make_tuple(copied[0], copied[1], copied[2], copied[3]);
    updated_ = std::move(made);
    return entry;
  }

  // After the update, if there has been one.
  Running current() const { return (updated_ ? *updated_ : old_).values(C_); }

 private:
  static nanobind::handle checked(nanobind::handle tuple) {
    if (!PyTuple_Check(tuple.ptr()) || NB_TUPLE_GET_SIZE(tuple.ptr()) < 5) decline(Refusal::state);
    return tuple;
  }
  nanobind::handle own(int i) const { return library_.own(tuple_, i); }

  static bool is_wide(const Array& array) {
    return array.element == Element::float32 || array.element == Element::float64;
  }

  void check_scalar(const Array& array, bool is_needed) const {
    if (!array && is_in_place_ && !is_needed) return;
    const bool fits = !array         ? false
                      : is_in_place_ ? array.size() == 1 && (is_wide(array) || array.element == Element::int64)
                                     : array.ndim == 0 && array.element == old_.mean.element;
    if (!fits || (!is_in_place_ && old_.spread.element != old_.mean.element)) decline(Refusal::state);
  }

  const Library& library_;
  nanobind::handle tuple_;
  bool is_in_place_;
  Averages old_;
  int64_t C_;
  std::unique_ptr<Averages> updated_;
};

}  // namespace batchnorm
