#include "layout.hpp"

#include <algorithm>
#include <cstdlib>

namespace batchnorm {
namespace {

// One axis, or several that are as good as one: its size, and its stride in each array.
struct Axis {
  int64_t size;
  int64_t strides[8];
};

struct Group {
  Axis axes[most_dimensions];
  int length = 0;

  // Axes next to each other become one where each array steps through them evenly.
  void merge(int arrays, int first_alone) {
    int merged = 0;
    for (int i = 1; i < length; ++i) {
      bool is_even = i != first_alone;
      for (int k = 0; k < arrays && is_even; ++k)
        is_even = axes[merged].strides[k] == axes[i].strides[k] * axes[i].size;
      if (is_even) {
        axes[merged].size *= axes[i].size;
        std::copy_n(axes[i].strides, arrays, axes[merged].strides);
      } else {
        axes[++merged] = axes[i];
      }
    }
    length = std::min(length, merged + 1);
  }
};

// An array without elements, whose strides mean nothing.
bool view_nothing(const Viewed* arrays, int count, uint32_t kept, Problem& problem) {
  const Array& x = *arrays[0].array;
  problem.N = problem.C = problem.S = 1;
  for (int axis = 0; axis < x.ndim; ++axis) (kept >> axis & 1 ? problem.C : problem.N) *= x.shape[axis];
  for (int i = 0; i < count; ++i) *arrays[i].tensor = {arrays[i].array->data, problem.C, 1, 1};
  return true;
}

}  // namespace

bool view(const Viewed* arrays, int count, uint32_t kept, bool is_ordered, Problem& problem) {
  const Array& x = *arrays[0].array;
  for (int i = 0; i < count; ++i)
    if (!arrays[i].array->has_whole_strides) return false;
  if (x.size() == 0) return view_nothing(arrays, count, kept, problem);
  Group channels, reduced;
  int first_alone = -1;
  for (int axis = 0; axis < x.ndim; ++axis) {
    const bool is_kept = kept >> axis & 1;
    if (!is_kept && is_ordered && first_alone < 0) first_alone = 1;
    else if (x.shape[axis] == 1) continue;
    Axis& added = (is_kept ? channels : reduced).axes[(is_kept ? channels : reduced).length++];
    added.size = x.shape[axis];
    for (int i = 0; i < count; ++i)
      added.strides[i] = arrays[i].array->shape[axis] == x.shape[axis] ? arrays[i].array->strides[axis] : 0;
  }
  if (!is_ordered)
    std::stable_sort(reduced.axes, reduced.axes + reduced.length,
                     [](const Axis& a, const Axis& b) { return std::abs(a.strides[0]) > std::abs(b.strides[0]); });
  channels.merge(count, -1);
  reduced.merge(count, first_alone);
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
