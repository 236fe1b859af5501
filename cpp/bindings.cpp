// The extension module `batchnorm._native`: arrays are checked and viewed here, and nothing is computed.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>

#include "checks.hpp"
#include "dispatch.hpp"
#include "memory.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

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

// ---- calls without a mask that nothing is unusual about ------------------------------------------------------------
//
// A batch norm of a megabyte takes 20 microseconds, in which the interpreter, its memory pushed out of the caches by the
// arrays, manages a few dozen steps. So here a plain call is checked, its results are allocated and it is computed, in
// one go. Where anything is out of the ordinary, or wrong, they return None: the long way sees to it and says so.

// How results are allocated: `empty_like(array)`, unless in memory of our own.
struct Allocator {
  handle empty_like;

  nb::object operator()(handle prototype) const { return empty_like(prototype); }
  nb::object operator()(handle prototype, const Array& array) const {
    nb::object result = large_like(prototype, array);
    return result ? result : empty_like(prototype);
  }
};

// None in place of the error that an unusual argument has caused.
template <class Compute> nb::object or_none(const Compute& compute) {
  try {
    return compute();
  } catch (const nb::python_error& error) {
    if (error.matches(PyExc_MemoryError)) throw;
  } catch (const nb::builtin_exception&) {
  }
  return nb::none();
}

bool is_plain(const Array& x, int& axis, double eps, std::initializer_list<const Array*> parameters) {
  if (axis < 0) axis += x.ndim;
  if (axis < 0 || axis >= x.ndim || x.size() == 0 || !(eps >= 0 && eps <= 1e300)) return false;
  return std::all_of(parameters.begin(), parameters.end(), [](const Array* p) { return !*p || p->ndim == 1; });
}

nb::object forward_plain(handle x_, handle gamma_, handle beta_, handle residual_, int axis, double eps,
                         uint8_t activation, double slope, int threads, handle empty_like, handle statistic_like,
                         handle count_like) {
  return or_none([&]() -> nb::object {
    const Array x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_), none("mask", nb::none());
    if (!is_plain(x, axis, eps, {&gamma, &beta})) return nb::none();
    if (residual) check_like(residual, x);
    const Allocator allocate{empty_like};
    nb::object y_ = allocate(x_, x), mean_ = allocate(statistic_like), mean_lo_ = allocate(statistic_like);
    nb::object rstd_ = allocate(statistic_like), count_ = allocate(count_like);
    const Array y("y", y_, true), mean("mean", mean_, true), mean_lo("mean_lo", mean_lo_, true);
    const Array rstd("rstd", rstd_, true), count("count", count_, true);
    Call call;
    Problem& problem = call.problem;
    call.add(x, problem.x);
    call.add(y, problem.y);
    call.add(residual, problem.residual);
    std::unique_ptr<int64_t[]> prefixes;
    if (!prepare(call, x, 1u << axis, none, none, prefixes, threads)) return nb::none();
    problem.mean = statistic(mean, problem.C, problem.dtype);
    problem.mean_lo = statistic(mean_lo, problem.C, problem.dtype);
    problem.rstd = statistic(rstd, problem.C, problem.dtype);
    problem.count = integers(count, problem.C);
    problem.gamma = channels(gamma, problem.C);
    problem.beta = channels(beta, problem.C);
    problem.eps = eps;
    problem.activation = static_cast<Activation>(activation);
    problem.slope = slope;
    if (!run(Operation::forward, problem)) return nb::none();
    return nb::make_tuple(y_, mean_, mean_lo_, rstd_, count_);
  });
}

// mean, what rounding takes of it, and rstd: tables of C each, in double and rounded once. False for values that are no
// statistics.
template <class F>
bool fill_statistics(const Array& mean, const Array& var, double eps, EpsPlacement placement, int64_t C, F* tables) {
  const auto value = [](const Array& array, int64_t c) {
    const int64_t i = c * array.strides[0];
    return array.element == Element::float64 ? static_cast<const double*>(array.data)[i]
                                             : static_cast<const float*>(array.data)[i];
  };
  for (int64_t c = 0; c < C; ++c) {
    const double m = value(mean, c), v = value(var, c);
    const double std = placement == EpsPlacement::inside ? std::sqrt(v + eps)
                                                         : std::sqrt(v) + (placement == EpsPlacement::outside ? eps : 0);
    if (!(std > 0)) return false;
    tables[c] = static_cast<F>(m);
    tables[C + c] = static_cast<F>(m - tables[c]);
    tables[2 * C + c] = static_cast<F>(1 / std);
  }
  return true;
}

// y by running statistics.
nb::object inference_plain(handle x_, handle gamma_, handle beta_, handle residual_, handle mean_, handle var_, int axis,
                           double eps, uint8_t eps_placement, uint8_t activation, double slope, int threads,
                           handle empty_like) {
  return or_none([&]() -> nb::object {
    const Array x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_), none("mask", nb::none());
    const Array mean("mean", mean_), var("var", var_);
    if (!is_plain(x, axis, eps, {&gamma, &beta, &mean, &var})) return nb::none();
    for (const Array* statistic : {&mean, &var}) {
      const bool is_floating = statistic->element == Element::float32 || statistic->element == Element::float64;
      if (!*statistic || !is_floating || !statistic->has_whole_strides || statistic->shape[0] != x.shape[axis]) return nb::none();
    }
    if (residual) check_like(residual, x);
    const Allocator allocate{empty_like};
    nb::object y_ = allocate(x_, x);
    const Array y("y", y_, true);
    Call call;
    Problem& problem = call.problem;
    call.add(x, problem.x);
    call.add(y, problem.y);
    call.add(residual, problem.residual);
    std::unique_ptr<int64_t[]> prefixes;
    if (!prepare(call, x, 1u << axis, none, none, prefixes, threads)) return nb::none();
    const int64_t C = problem.C;
    const std::unique_ptr<double[]> tables(new double[3 * C]);
    const auto fill = [&](auto* table) {
      problem.mean = table, problem.mean_lo = table + C, problem.rstd = table + 2 * C;
      return fill_statistics(mean, var, eps, static_cast<EpsPlacement>(eps_placement), C, table);
    };
    const bool is_double = problem.dtype == Dtype::float64;
    if (!(is_double ? fill(tables.get()) : fill(reinterpret_cast<float*>(tables.get())))) return nb::none();
    problem.gamma = channels(gamma, problem.C);
    problem.beta = channels(beta, problem.C);
    problem.measure = false;
    problem.activation = static_cast<Activation>(activation);
    problem.slope = slope;
    if (!run(Operation::forward, problem)) return nb::none();
    return y_;
  });
}

nb::object backward_plain(handle dy_, handle x_, handle gamma_, handle beta_, handle residual_, handle mean_,
                          handle mean_lo_, handle rstd_, handle count_, uint32_t kept, uint8_t activation,
                          double slope, int threads, handle empty_like) {
  return or_none([&]() -> nb::object {
    const Array dy("dy", dy_), x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_);
    const Array mean("mean", mean_), mean_lo("mean_lo", mean_lo_), rstd("rstd", rstd_), count("count", count_);
    const Array none("mask", nb::none());
    if (x.size() == 0) return nb::none();
    check_like(dy, x);
    if (residual) check_like(residual, x);
    const Allocator allocate{empty_like};
    nb::object dx_ = allocate(x_, x);
    nb::object dgamma_ = gamma ? allocate(gamma_) : nb::none(), dbeta_ = beta ? allocate(beta_) : nb::none();
    nb::object dresidual_ = residual ? allocate(residual_, residual) : nb::none();
    const Array dx("dx", dx_, true), dgamma("dgamma", dgamma_, true), dbeta("dbeta", dbeta_, true);
    const Array dresidual("dresidual", dresidual_, true);
    Call call;
    Problem& problem = call.problem;
    call.add(x, problem.x);
    call.add(dy, problem.dy);
    call.add(residual, problem.residual);
    call.add(dx, problem.dx);
    call.add(dresidual, problem.dresidual);
    std::unique_ptr<int64_t[]> prefixes;
    if (!prepare(call, x, kept, none, none, prefixes, threads)) return nb::none();
    problem.mean = statistic(mean, problem.C, problem.dtype);
    problem.mean_lo = statistic(mean_lo, problem.C, problem.dtype);
    problem.rstd = statistic(rstd, problem.C, problem.dtype);
    problem.count = integers(count, problem.C);
    problem.gamma = channels(gamma, problem.C);
    problem.beta = channels(beta, problem.C);
    problem.dgamma = channels(dgamma, problem.C);
    problem.dbeta = channels(dbeta, problem.C);
    problem.measure = false;
    problem.activation = static_cast<Activation>(activation);
    problem.slope = slope;
    if (!run(Operation::backward, problem)) return nb::none();
    return nb::make_tuple(dx_, dgamma_, dbeta_, dresidual_);
  });
}

// The like of an array in memory of our own; None where its library has to allocate it.
nb::object result_like(handle array) {
  const nb::object result = large_like(array, Array("array", array));
  return result ? result : nb::none();
}

// A block of memory.hpp as an object with a buffer, for libraries that make arrays of one.
struct Block {
  int64_t bytes;
  void* data;

  explicit Block(int64_t bytes) : bytes(bytes), data(take_block(bytes)) {}
  ~Block() { give_back_block(data, bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

int get_buffer(PyObject* object, Py_buffer* view, int flags) {
  const Block* block = nb::inst_ptr<Block>(object);
  return PyBuffer_FillInfo(view, object, block->data, block->bytes, false, flags);
}

PyType_Slot block_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)}, {0, nullptr}};

}  // namespace
}  // namespace batchnorm

NB_MODULE(_native, m) {
  using namespace batchnorm;
  m.doc() = "Batch normalization kernels on CPU arrays. Private: `batchnorm.kernels.native` is its only caller.";
  choose_kernels(nullptr);
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
  m.def("forward_plain", &forward_plain, nb::arg("x"), optional("gamma"), optional("beta"), optional("residual"),
        nb::arg("axis"), nb::arg("eps"), nb::arg("activation"), nb::arg("slope"), nb::arg("threads"),
        nb::arg("empty_like"), nb::arg("statistic_like"), nb::arg("count_like"));
  m.def("inference_plain", &inference_plain, nb::arg("x"), optional("gamma"), optional("beta"), optional("residual"),
        nb::arg("mean"), nb::arg("var"), nb::arg("axis"), nb::arg("eps"), nb::arg("eps_placement"),
        nb::arg("activation"), nb::arg("slope"), nb::arg("threads"), nb::arg("empty_like"));
  m.def("backward_plain", &backward_plain, nb::arg("dy"), nb::arg("x"), optional("gamma"), optional("beta"),
        optional("residual"), nb::arg("mean"), nb::arg("mean_lo"), nb::arg("rstd"), nb::arg("count"), nb::arg("kept"),
        nb::arg("activation"), nb::arg("slope"), nb::arg("threads"), nb::arg("empty_like"));
  nb::class_<Block>(m, "Block", nb::type_slots(block_slots)).def(nb::init<int64_t>(), nb::arg("bytes"));
  m.attr("smallest_block") = smallest_block;
  m.def("result_like", &result_like);
  m.def("waiting_bytes", &waiting_bytes);
  m.def("release_blocks", &release_blocks);
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
