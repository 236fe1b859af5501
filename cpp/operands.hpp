// The checked arrays of a call, and their groups of examples.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "checks.hpp"
#include "library.hpp"

namespace batchnorm {

// The lengths in the place of a mask; None if it has a mask or None.
inline nanobind::handle lengths_of(nanobind::handle mask) {
  if (!PyTuple_Check(mask.ptr())) return nanobind::handle(Py_None);
  if (NB_TUPLE_GET_SIZE(mask.ptr()) != 1) decline(Refusal::type);
  return nanobind::handle(NB_TUPLE_GET_ITEM(mask.ptr(), 0));
}

// The operands of a call, checked.
struct Operands {
  nanobind::handle objects;
  Array x, gamma, beta, residual, mask, lengths;

  Operands(const Library& library, nanobind::handle tuple, const Spec& spec)
      : objects(check_tuple(tuple)), x(library.require_own(tuple, 0)), gamma(library.require_own(tuple, 1)),
        beta(library.require_own(tuple, 2)), residual(library.require_own(tuple, 3)),
        mask(PyTuple_Check(item(4).ptr()) ? nanobind::handle(Py_None) : library.require_own(tuple, 4)),
        lengths(library.require_own(lengths_of(item(4)))) {
    if (!x || x.ndim == 0 || (x.ndim < 32 && spec.channel_axes >> x.ndim)) decline(Refusal::shape);
    if (spec.group_size && !spec.has_lanes() && (spec.channel_axes & 1)) decline(Refusal::shape);
    x.dtype();
    if (residual) check_like(residual, x);
    for (const Array* parameter : {&gamma, &beta}) check_by_channel(*parameter, x, spec.channel_axes);
    check_mask(mask, x);
    check_lengths(lengths, x, spec.channel_axes);
  }

  static nanobind::handle check_tuple(nanobind::handle tuple) {
    if (!PyTuple_Check(tuple.ptr()) || NB_TUPLE_GET_SIZE(tuple.ptr()) != 5) decline(Refusal::type);
    return tuple;
  }
  nanobind::handle item(int i) const { return nanobind::handle(NB_TUPLE_GET_ITEM(objects.ptr(), i)); }
  bool is_masked() const { return mask || lengths; }

  // The product of the sizes of x along its channel axes, or along the others, from axis `first` on.
  int64_t size_along(uint32_t channel_axes, bool are_channels, int first) const {
    int64_t size = 1;
    for (int axis = first; axis < x.ndim; ++axis)
      if (static_cast<bool>(channel_axes >> axis & 1) == are_channels) size *= x.shape[axis];
    return size;
  }
};

// Slices of the first axis that are normalized separately; a single group of everything if the spec has no groups.
//
// The last group may be smaller. If it would have one element for each channel, it is merged into the group before it.
class Groups {
 public:
  Groups(const Spec& spec, const Operands& operands, bool are_separate) : length_(operands.x.shape[0]) {
    if (!spec.group_size || !are_separate) return;
    are_sliced_ = true;
    size_ = spec.group_size;
    const int64_t rest = length_ % size_, inner = operands.size_along(spec.channel_axes, false, 1);
    number_ = length_ / size_ + (rest * inner > 1);
    if (!spec.has_lanes()) number_ = std::max<int64_t>(number_, 1);
  }

  int64_t number() const { return number_; }
  int64_t begin(int64_t group) const { return group * size_; }
  int64_t length(int64_t group) const { return group == number_ - 1 ? length_ - begin(group) : size_; }

  // Narrows the arrays to one group. Called for one group after the other, because each call starts from the previous
  // group.
  void narrow(int64_t group, std::initializer_list<Array*> arrays) const {
    if (!are_sliced_) return;
    for (Array* array : arrays) array->narrow(group ? length(group - 1) : 0, length(group));
  }

 private:
  int64_t length_, size_ = 0, number_ = 1;
  bool are_sliced_ = false;
};

// The channels of one group, out of those of all groups.
inline PerChannel group_slice(const PerChannel& all, int64_t group, int64_t C) {
  if (!all.data) return all;
  return {static_cast<char*>(all.data) + group * C * all.stride * size_of(all.dtype), all.dtype, all.stride};
}

}  // namespace batchnorm
