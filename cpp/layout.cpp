#include "layout.hpp"

#include <algorithm>
#include <cstdlib>

namespace batchnorm {
namespace {

// One axis, or several merged ones: its size, and its stride in each array.
struct Axis {
  int64_t size;
  int64_t strides[8];
};

struct AxisList {
  Axis axes[max_dimensions];
  int length = 0;

  // Merges adjacent axes that each array traverses evenly, but not axis `unmerged` with the one before it.
  void merge(int arrays, int unmerged) {
    int last = 0;
    for (int i = 1; i < length; ++i) {
      bool is_mergeable = i != unmerged;
      for (int k = 0; k < arrays && is_mergeable; ++k)
        is_mergeable = axes[last].strides[k] == axes[i].strides[k] * axes[i].size;
      if (is_mergeable) {
        axes[last].size *= axes[i].size;
        std::copy_n(axes[i].strides, arrays, axes[last].strides);
      } else {
        axes[++last] = axes[i];
      }
    }
    length = std::min(length, last + 1);
  }
};

// Views arrays without elements, whose strides are meaningless.
bool view_empty(const ArrayView* arrays, int count, uint32_t channel_axes, Problem& problem) {
  const Array& x = *arrays[0].array;
  problem.N = problem.C = problem.S = 1;
  for (int axis = 0; axis < x.ndim; ++axis) (channel_axes >> axis & 1 ? problem.C : problem.N) *= x.shape[axis];
  for (int i = 0; i < count; ++i) *arrays[i].tensor = {arrays[i].array->data, problem.C, 1, 1};
  return true;
}

}  // namespace

bool view(const ArrayView* arrays, int count, uint32_t channel_axes, bool is_ordered, Problem& problem) {
  const Array& x = *arrays[0].array;
  for (int i = 0; i < count; ++i)
    if (!arrays[i].array->has_whole_strides) return false;
  if (x.size() == 0) return view_empty(arrays, count, channel_axes, problem);
  AxisList channels, reduced;
  int unmerged = -1;
  for (int axis = 0; axis < x.ndim; ++axis) {
    const bool is_channel = channel_axes >> axis & 1;
    if (!is_channel && is_ordered && unmerged < 0) unmerged = 1;
    else if (x.shape[axis] == 1) continue;
    Axis& added = (is_channel ? channels : reduced).axes[(is_channel ? channels : reduced).length++];
    added.size = x.shape[axis];
    for (int i = 0; i < count; ++i)
      added.strides[i] = arrays[i].array->shape[axis] == x.shape[axis] ? arrays[i].array->strides[axis] : 0;
  }
  if (!is_ordered)
    std::stable_sort(reduced.axes, reduced.axes + reduced.length,
                     [](const Axis& a, const Axis& b) { return std::abs(a.strides[0]) > std::abs(b.strides[0]); });
  channels.merge(count, -1);
  reduced.merge(count, unmerged);
  if (channels.length > 1 || reduced.length > 2) return false;

  const bool has_n = reduced.length == 2 || (is_ordered && reduced.length == 1);
  const Axis* n = has_n ? &reduced.axes[0] : nullptr;
  const Axis* s = reduced.length == (has_n ? 2 : 1) ? &reduced.axes[reduced.length - 1] : nullptr;
  const Axis* c = channels.length ? &channels.axes[0] : nullptr;
  problem.N = n ? n->size : 1;
  problem.C = c ? c->size : 1;
  problem.S = s ? s->size : 1;
  for (int i = 0; i < count; ++i)
    *arrays[i].tensor = {arrays[i].array->data, n ? n->strides[i] : 0, c ? c->strides[i] : 0, s ? s->strides[i] : 0};
  return true;
}

}  // namespace batchnorm
