// The extension module `batchnorm._native`: arrays are checked and viewed here, and nothing is computed.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "arrays.hpp"
#include "dispatch.hpp"
#include "layout.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

[[noreturn]] void refuse(const Array& array, const char* problem) {
  throw nb::value_error((std::string(array.name) + " " + problem).c_str());
}

void check_like(const Array& array, const Array& x) {
  if (array.element != x.element) throw nb::type_error((std::string(array.name) + " must have the dtype of x").c_str());
  if (array.ndim != x.ndim || !std::equal(x.shape, x.shape + x.ndim, array.shape))
    refuse(array, "must have the shape of x");
}

// One number for each of C channels, in any floating dtype.
Channels channels(const Array& array, int64_t C) {
  if (!array) return {};
  if (array.size() != C) refuse(array, "must have one element for each channel");
  if (array.ndim != 1 && !array.is_contiguous()) refuse(array, "must be contiguous");
  return {array.data, array.dtype(), array.ndim == 1 ? array.strides[0] : 1};
}

// The same in the dtype of the statistics of x, contiguous.
void* statistic(const Array& array, int64_t C, Dtype dtype) {
  if (!array) return nullptr;
  if (array.size() != C || !array.is_contiguous()) refuse(array, "must hold one contiguous element for each channel");
  const Element expected = dtype == Dtype::float64 ? Element::float64 : Element::float32;
  if (array.element != expected) throw nb::type_error((std::string(array.name) + " has the wrong dtype").c_str());
  return array.data;
}

int64_t* integers(const Array& array, int64_t length) {
  if (!array) return nullptr;
  if (array.element != Element::int64 || array.size() != length || !array.is_contiguous())
    refuse(array, "must be int64, contiguous and of the right length");
  return static_cast<int64_t*>(array.data);
}

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

// An output may be one of the inputs itself, element for element; any other overlap would be read after it is written.
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

struct Call {
  Problem problem = {};
  Viewed viewed[8];
  int count = 0;

  void add(const Array& array, Tensor& tensor) {
    if (array) viewed[count++] = {&array, &tensor};
  }
};

// Fills in the views, the mask (`keep`: bytes that broadcast to x; `lengths`: for each index of the first reduced axis,
// how many of the second count) the mask and the threads. False if the strides of the arrays fit no kernel.
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
    const int64_t* given = integers(lengths, x.shape[reduced[0]]);
    const int64_t steps = x.shape[reduced[1]];
    prefixes.reset(new int64_t[problem.N + 1]);
    for (int64_t n = 0; n < problem.N; ++n) {
      if (given[n] < 0 || given[n] > steps) refuse(lengths, "must lie between 0 and the size of the time axis");
      prefixes[n] = steps ? given[n] * (problem.S / steps) : 0;
    }
    problem.mask.lengths = prefixes.get();
  }
  return true;
}

bool run(Operation operation, Problem& problem) {
  nb::gil_scoped_release unlocked;
  return compute(operation, problem);
}

bool forward(handle x_, handle y_, handle gamma_, handle beta_, handle residual_, handle mean_, handle mean_lo_,
             handle m2_, handle rstd_, handle count_, handle keep_, handle lengths_, uint32_t kept, bool measure,
             double eps, uint8_t eps_placement, int correction, uint8_t activation, double slope,
             bool normalized_padding, int threads) {
  const Array x("x", x_), y("y", y_, true), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_);
  const Array mean("mean", mean_, measure), mean_lo("mean_lo", mean_lo_, measure), m2("m2", m2_, measure);
  const Array rstd("rstd", rstd_, measure), count("count", count_, measure), keep("mask", keep_), lengths("lengths", lengths_);
  if (activation > static_cast<uint8_t>(Activation::gelu) || eps_placement > static_cast<uint8_t>(EpsPlacement::absent))
    throw nb::value_error("unknown activation or placement of eps");
  if (y) check_like(y, x), check_writable(y), check_overlap(y, x, true);
  if (residual) check_like(residual, x), check_overlap(y, residual, true);
  Call call;
  Problem& problem = call.problem;
  call.add(x, problem.x);
  call.add(y, problem.y);
  call.add(residual, problem.residual);
  std::unique_ptr<int64_t[]> prefixes;
  if (!prepare(call, x, kept, keep, lengths, prefixes, threads)) return false;
  const auto table = [&](const Array& array) { return statistic(array, problem.C, problem.dtype); };
  problem.mean = table(mean);
  problem.mean_lo = table(mean_lo);
  problem.m2 = table(m2);
  problem.rstd = table(rstd);
  problem.count = integers(count, problem.C);
  if ((y || !measure) && !(mean && mean_lo && rstd)) throw nb::value_error("y needs mean, mean_lo and rstd");
  problem.gamma = channels(gamma, problem.C);
  problem.beta = channels(beta, problem.C);
  problem.measure = measure;
  problem.eps = eps;
  problem.eps_placement = static_cast<EpsPlacement>(eps_placement);
  problem.correction = correction;
  problem.activation = static_cast<Activation>(activation);
  problem.slope = slope;
  problem.normalized_padding = normalized_padding;
  return run(Operation::forward, problem);
}

bool backward(handle dy_, handle x_, handle dx_, handle gamma_, handle beta_, handle residual_, handle dgamma_,
              handle dbeta_, handle dresidual_, handle mean_, handle mean_lo_, handle rstd_, handle count_,
              handle factor_, handle keep_, handle lengths_, uint32_t kept, bool through_statistics,
              uint8_t activation, double slope, int threads) {
  const Array x("x", x_), dy("dy", dy_), dx("dx", dx_, true), gamma("gamma", gamma_), beta("beta", beta_);
  const Array residual("residual", residual_), dgamma("dgamma", dgamma_, true), dbeta("dbeta", dbeta_, true);
  const Array dresidual("dresidual", dresidual_, true), mean("mean", mean_), mean_lo("mean_lo", mean_lo_);
  const Array rstd("rstd", rstd_), count("count", count_), factor("factor", factor_), keep("mask", keep_), lengths("lengths", lengths_);
  if (activation > static_cast<uint8_t>(Activation::gelu)) throw nb::value_error("unknown activation");
  if (!dy) refuse(dy, "is needed");
  check_like(dy, x);
  for (const Array* array : {&residual, &dx, &dresidual})
    if (*array) check_like(*array, x);
  for (const Array* output : {&dx, &dresidual}) {
    check_writable(*output);
    for (const Array* input : {&x, &dy, &residual}) check_overlap(*output, *input, true);
  }
  check_overlap(dx, dresidual, false);
  Call call;
  Problem& problem = call.problem;
  call.add(x, problem.x);
  call.add(dy, problem.dy);
  call.add(residual, problem.residual);
  call.add(dx, problem.dx);
  call.add(dresidual, problem.dresidual);
  std::unique_ptr<int64_t[]> prefixes;
  if (!prepare(call, x, kept, keep, lengths, prefixes, threads)) return false;
  if (!(mean && mean_lo && rstd)) throw nb::value_error("backward needs mean, mean_lo and rstd");
  problem.mean = statistic(mean, problem.C, problem.dtype);
  problem.mean_lo = statistic(mean_lo, problem.C, problem.dtype);
  problem.rstd = statistic(rstd, problem.C, problem.dtype);
  problem.count = integers(count, problem.C);
  problem.gamma = channels(gamma, problem.C);
  problem.beta = channels(beta, problem.C);
  problem.factor = channels(factor, problem.C);
  problem.dgamma = channels(dgamma, problem.C);
  problem.dbeta = channels(dbeta, problem.C);
  problem.measure = false;
  problem.through_statistics = through_statistics;
  problem.activation = static_cast<Activation>(activation);
  problem.slope = slope;
  return run(Operation::backward, problem);
}

// Asks the system for huge pages behind memory that has not been touched yet.
void advise_huge_pages(handle array_) {
  const Array array("array", array_, true);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = 2 << 20;
  const Extent all = extent(array);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(all.begin) + huge - 1) / huge * huge;
  const uintptr_t end = reinterpret_cast<uintptr_t>(all.end) / huge * huge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace batchnorm

NB_MODULE(_native, m) {
  using namespace batchnorm;
  m.doc() = "Batch normalization kernels on CPU arrays. Private: `batchnorm.kernels.native` is its only caller.";
  choose_kernels(std::getenv("BATCHNORM_INSTRUCTION_SET"));
  const auto optional = [](const char* name) { return nb::arg(name).none(); };
  m.def("forward", &forward, nb::arg("x"), optional("y"), optional("gamma"), optional("beta"), optional("residual"),
        optional("mean"), optional("mean_lo"), optional("m2"), optional("rstd"), optional("count"), optional("mask"),
        optional("lengths"), nb::arg("kept"), nb::arg("measure"), nb::arg("eps"), nb::arg("eps_placement"),
        nb::arg("correction"), nb::arg("activation"), nb::arg("slope"), nb::arg("normalized_padding"),
        nb::arg("threads"));
  m.def("backward", &backward, nb::arg("dy"), nb::arg("x"), optional("dx"), optional("gamma"), optional("beta"),
        optional("residual"), optional("dgamma"), optional("dbeta"), optional("dresidual"), nb::arg("mean"),
        nb::arg("mean_lo"), nb::arg("rstd"), optional("count"), optional("factor"), optional("mask"),
        optional("lengths"), nb::arg("kept"), nb::arg("through_statistics"), nb::arg("activation"), nb::arg("slope"),
        nb::arg("threads"));
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("instruction_set", [] { return chosen_kernels().name; });
  m.def("set_instruction_set", &choose_kernels);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_kernels()) names.push_back(kernels->name);
    return names;
  });
}
