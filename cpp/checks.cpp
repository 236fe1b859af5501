#include "checks.hpp"

#include <algorithm>
#include <string>

namespace nb = nanobind;

namespace batchnorm {

[[noreturn]] void refuse(const Array& array, const char* problem) {
  throw nb::value_error((std::string(array.name) + " " + problem).c_str());
}

void check_like(const Array& array, const Array& x) {
  if (array.element != x.element) throw nb::type_error((std::string(array.name) + " must have the dtype of x").c_str());
  if (array.ndim != x.ndim || !std::equal(x.shape, x.shape + x.ndim, array.shape))
    refuse(array, "must have the shape of x");
}

Channels channels(const Array& array, int64_t C) {
  if (!array) return {};
  if (array.size() != C) refuse(array, "must have one element for each channel");
  if (!array.has_whole_strides || (array.ndim != 1 && !array.is_contiguous())) refuse(array, "must be contiguous");
  return {array.data, array.dtype(), array.ndim == 1 ? array.strides[0] : 1};
}

void* statistic(const Array& array, int64_t C, Dtype dtype) {
  if (!array) return nullptr;
  if (array.size() != C || !array.is_contiguous()) refuse(array, "must hold one contiguous element for each channel");
  const Element expected = dtype == Dtype::float64 ? Element::float64 : Element::float32;
  if (array.element != expected) throw nb::type_error((std::string(array.name) + " has the wrong dtype").c_str());
  return array.data;
}

void* integers(const Array& array, int64_t length) {
  if (!array) return nullptr;
  if (array.element != Element::int64 || array.size() != length || !array.is_contiguous())
    refuse(array, "must be int64, contiguous and of the right length");
  return array.data;
}

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

void check_overlap(const Array& output, const Array& other, bool may_be_same) {
  if (!output || !other) return;
  const Extent a = extent(output), b = extent(other);
  if (a.begin >= b.end || b.begin >= a.end) return;
  const bool is_same = output.data == other.data && std::equal(output.strides, output.strides + output.ndim, other.strides);
  if (!(is_same && may_be_same)) refuse(output, (std::string("overlaps ") + other.name).c_str());
}

void check_writable(const Array& output) {
  if (!output || output.size() == 0) return;
  for (int i = 0; i < output.ndim; ++i)
    if (output.shape[i] > 1 && output.strides[i] == 0) refuse(output, "has elements that share memory");
}

bool prepare(Call& call, const Array& x, uint32_t kept, const Array& keep, const Array& lengths,
             std::unique_ptr<int64_t[]>& prefixes, int threads) {
  Problem& problem = call.problem;
  if (x.ndim == 0 || x.ndim > most_dimensions || (x.ndim < 32 && kept >> x.ndim)) refuse(x, "has no such axes");
  problem.dtype = x.dtype();
  problem.threads = threads > 0 ? threads : num_threads();
  if (keep) {
    if (keep.element != Element::byte || keep.ndim != x.ndim) refuse(keep, "must be boolean, of the rank of x");
    for (int i = 0; i < x.ndim; ++i)
      if (keep.shape[i] != x.shape[i] && keep.shape[i] != 1) refuse(keep, "does not broadcast to x");
  }
  call.add(keep, problem.mask.keep);
  if (!view(call.viewed, call.count, kept, static_cast<bool>(lengths), problem)) return false;
  if (lengths) {
    int reduced[2], found = 0;
    for (int axis = 0; axis < x.ndim && found < 2; ++axis)
      if (!(kept >> axis & 1)) reduced[found++] = axis;
    if (found < 2) refuse(lengths, "need a batch axis and a time axis");
    const void* const given = integers(lengths, x.shape[reduced[0]]);
    const int64_t steps = x.shape[reduced[1]];
    prefixes.reset(new int64_t[problem.N + 1]);
    for (int64_t n = 0; x.size() && n < problem.N; ++n) {
      const int64_t length = element_at<int64_t>(given, n);
      if (length < 0 || length > steps) refuse(lengths, "must lie between 0 and the size of the time axis");
      prefixes[n] = steps ? length * (problem.S / steps) : 0;
    }
    problem.mask.lengths = prefixes.get();
  }
  return true;
}

void set_statistics(Problem& problem, const Array& mean, const Array& mean_lo, const Array& rstd) {
  problem.mean = statistic(mean, problem.C, problem.dtype);
  problem.mean_lo = statistic(mean_lo, problem.C, problem.dtype);
  problem.rstd = statistic(rstd, problem.C, problem.dtype);
}

void set_parameters(Problem& problem, const Array& gamma, const Array& beta, uint8_t activation, double slope) {
  if (activation > static_cast<uint8_t>(Activation::hardswish)) throw nb::value_error("unknown activation");
  problem.gamma = channels(gamma, problem.C);
  problem.beta = channels(beta, problem.C);
  problem.activation = static_cast<Activation>(activation);
  problem.slope = slope;
}

bool compute_unlocked(Operation operation, Problem& problem) {
  nb::gil_scoped_release unlocked;
  return compute(operation, problem);
}

}  // namespace batchnorm
