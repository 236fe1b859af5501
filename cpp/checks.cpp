#include "checks.hpp"

#include <nanobind/nanobind.h>

#include <algorithm>

namespace batchnorm {
namespace {

// The range of addresses of an array.
struct Extent { const char *begin, *end; };

Extent extent(const Array& array) {
  const int64_t size = size_of(array.dtype());
  const char *low = static_cast<const char*>(array.data), *high = low + size;
  for (int i = 0; i < array.ndim; ++i) {
    if (array.shape[i] == 0) return {low, low};
    const int64_t reach = (array.shape[i] - 1) * array.strides[i] * size;
    (reach < 0 ? low : high) += reach;
  }
  return {low, high};
}

// The first two axes that are no channel axes.
struct TimeAxes {
  int batch = 0, time = 0, found = 0;

  TimeAxes(const Array& x, uint32_t channel_axes) {
    for (int axis = 0; axis < x.ndim && found < 2; ++axis)
      if (!(channel_axes >> axis & 1)) (found++ ? time : batch) = axis;
  }
};

}  // namespace

void check_like(const Array& array, const Array& x) {
  if (array.element != x.element) decline(Refusal::dtype);
  if (array.ndim != x.ndim || !std::equal(x.shape, x.shape + x.ndim, array.shape)) decline(Refusal::shape);
}

void check_by_channel(const Array& array, const Array& x, uint32_t channel_axes) {
  if (!array) return;
  int i = 0;
  for (int axis = 0; axis < x.ndim; ++axis)
    if (channel_axes >> axis & 1)
      if (i >= array.ndim || array.shape[i++] != x.shape[axis]) decline(Refusal::shape);
  if (i != array.ndim) decline(Refusal::shape);
}

PerChannel per_channel(const Array& array, int64_t C) {
  if (!array) return {};
  const Dtype dtype = array.dtype();
  if (array.size() != C) decline(Refusal::shape);
  if (!array.has_whole_strides || (array.ndim != 1 && !array.is_contiguous())) decline(Refusal::strides);
  return {array.data, dtype, array.ndim == 1 ? array.strides[0] : 1};
}

void check_mask(Array& mask, const Array& x) {
  if (!mask) return;
  if (mask.element != Element::boolean) decline(Refusal::dtype);
  if (mask.ndim > x.ndim) decline(Refusal::shape);
  mask.pad(x.ndim);
  for (int i = 0; i < x.ndim; ++i)
    if (mask.shape[i] != x.shape[i] && mask.shape[i] != 1) decline(Refusal::shape);
}

void check_output(const Array& output) {
  if (!output || output.size() == 0) return;
  for (int i = 0; i < output.ndim; ++i)
    if (output.shape[i] > 1 && output.strides[i] == 0) decline(Refusal::output);
}

void check_overlap(const Array& output, const Array& other, bool may_be_same) {
  if (!output || !other) return;
  const Extent output_extent = extent(output), other_extent = extent(other);
  if (output_extent.begin >= other_extent.end || other_extent.begin >= output_extent.end) return;
  const bool is_same =
      output.data == other.data && std::equal(output.strides, output.strides + output.ndim, other.strides);
  if (!(is_same && may_be_same)) decline(Refusal::output);
}

void check_lengths(const Array& lengths, const Array& x, uint32_t channel_axes) {
  if (!lengths) return;
  const TimeAxes axes(x, channel_axes);
  if (axes.found < 2 || lengths.ndim != 1 || lengths.shape[0] != x.shape[axes.batch]) decline(Refusal::shape);
  if (lengths.element != Element::int64) decline(Refusal::dtype);
  if (!lengths.has_whole_strides) decline(Refusal::dtype);
  for (int64_t n = 0; n < lengths.shape[0]; ++n) {
    const int64_t length = element_at<int64_t>(lengths.data, n * lengths.strides[0]);
    if (length < 0 || length > x.shape[axes.time]) decline(Refusal::shape);
  }
}

void Views::finish(const Array& x, uint32_t channel_axes, const Array& mask, const Array& lengths) {
  problem.dtype = x.dtype();
  add(mask, problem.mask.bytes);
  if (!view(views_, count_, channel_axes, static_cast<bool>(lengths), problem)) decline(Refusal::strides);
  if (!lengths) return;
  const int64_t time_steps = x.shape[TimeAxes(x, channel_axes).time];
  lengths_.reset(new int64_t[problem.N + 1]());
  for (int64_t n = 0; time_steps && n < std::min(problem.N, lengths.shape[0]); ++n)
    lengths_[n] = element_at<int64_t>(lengths.data, n * lengths.strides[0]) * (problem.S / time_steps);
  problem.mask.lengths = lengths_.get();
}

void compute_without_gil(Operation operation, Problem& problem) {
  nanobind::gil_scoped_release released;
  if (!compute(operation, problem)) decline(Refusal::strides);
}

}  // namespace batchnorm
