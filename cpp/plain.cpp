// Calls without a mask that nothing is unusual about.
#include "plain.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "checks.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

// How results are allocated: `empty_like(array)`, unless in memory of our own.
struct Allocator {
  handle empty_like;

  nb::object like(handle array_, const Array& array) const {
    nb::object result = large_like(array_, array);
    return result ? result : empty_like(array_);
  }
  nb::object like(handle array_) const { return empty_like(array_); }

  // One number for each channel: like the prototype or, for None, in the library of x.
  nb::object table(handle prototype, handle x, Element element, int64_t C) const {
    return prototype.is_none() ? table_for(x, element, C) : empty_like(prototype);
  }
};

// None in place of the error that an unusual argument has caused; not of Ctrl-C in the library's allocation.
template <class Compute> nb::object or_none(const Compute& compute) {
  try {
    return compute();
  } catch (const nb::python_error& error) {
    if (error.matches(PyExc_MemoryError) || !error.matches(PyExc_Exception)) throw;
  } catch (const nb::builtin_exception&) {
  }
  return nb::none();
}

bool is_plain(const Array& x, int& axis, double eps, std::initializer_list<const Array*> parameters) {
  if (axis < 0) axis += x.ndim;
  if (axis < 0 || axis >= x.ndim || x.size() == 0 || !(eps >= 0 && eps <= 1e300)) return false;
  return std::all_of(parameters.begin(), parameters.end(), [](const Array* p) { return !*p || p->ndim == 1; });
}

// mean, what rounding takes of it, and rstd: tables of C each, in double and rounded once. False for values that are no
// statistics.
template <class F>
bool fill_statistics(const Array& mean, const Array& var, double eps, EpsPlacement placement, int64_t C, F* tables) {
  const auto value = [](const Array& array, int64_t c) {
    const auto at = [&](auto number) {
      const int64_t offset = c * array.strides[0] * static_cast<int64_t>(sizeof number);
      std::memcpy(&number, static_cast<const char*>(array.data) + offset, sizeof number);
      return static_cast<double>(number);
    };
    return array.element == Element::float64 ? at(double{}) : at(float{});
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

}  // namespace

nb::object forward_plain(handle x_, handle gamma_, handle beta_, handle residual_, handle out_, int axis, double eps,
                         uint8_t activation, double slope, int threads, handle empty_like, handle statistic_like,
                         handle count_like) {
  return or_none([&]() -> nb::object {
    const Array x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_), none("mask", nb::none());
    if (!is_plain(x, axis, eps, {&gamma, &beta})) return nb::none();
    if (residual) check_like(residual, x);
    const Allocator allocate{empty_like};
    const Element wide = x.element == Element::float64 ? Element::float64 : Element::float32;
    const auto statistics = [&] { return allocate.table(statistic_like, x_, wide, x.shape[axis]); };
    nb::object y_ = out_.is_none() ? allocate.like(x_, x) : nb::borrow(out_);
    nb::object mean_ = statistics(), mean_lo_ = statistics(), rstd_ = statistics();
    nb::object count_ = allocate.table(count_like, x_, Element::int64, x.shape[axis]);
    const Array y("y", y_, true), mean("mean", mean_, true), mean_lo("mean_lo", mean_lo_, true);
    const Array rstd("rstd", rstd_, true), count("count", count_, true);
    if (!out_.is_none()) {
      check_like(y, x);
      check_writable(y);
      for (const Array* input : {&x, &residual}) check_overlap(y, *input, true);
      for (const Array* parameter : {&gamma, &beta}) check_overlap(y, *parameter, false);
    }
    Call call;
    Problem& problem = call.problem;
    call.add(x, problem.x);
    call.add(y, problem.y);
    call.add(residual, problem.residual);
    std::unique_ptr<int64_t[]> prefixes;
    if (!prepare(call, x, 1u << axis, none, none, prefixes, threads)) return nb::none();
    set_statistics(problem, mean, mean_lo, rstd, count);
    set_parameters(problem, gamma, beta, activation, slope);
    problem.eps = eps;
    if (!compute_unlocked(Operation::forward, problem)) return nb::none();
    return nb::make_tuple(y_, mean_, mean_lo_, rstd_, count_);
  });
}

nb::object inference_plain(handle x_, handle gamma_, handle beta_, handle residual_, handle mean_, handle var_, int axis,
                           double eps, uint8_t eps_placement, uint8_t activation, double slope, int threads,
                           handle empty_like) {
  return or_none([&]() -> nb::object {
    const Array x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_), none("mask", nb::none());
    const Array mean("mean", mean_), var("var", var_);
    if (!is_plain(x, axis, eps, {&gamma, &beta, &mean, &var})) return nb::none();
    for (const Array* given : {&mean, &var}) {
      const bool is_wide = given->element == Element::float32 || given->element == Element::float64;
      if (!*given || !is_wide || !given->has_whole_strides || given->shape[0] != x.shape[axis]) return nb::none();
    }
    if (residual) check_like(residual, x);
    const Allocator allocate{empty_like};
    nb::object y_ = allocate.like(x_, x);
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
    set_parameters(problem, gamma, beta, activation, slope);
    problem.measure = false;
    if (!compute_unlocked(Operation::forward, problem)) return nb::none();
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
    nb::object dx_ = allocate.like(x_, x);
    nb::object dgamma_ = gamma ? allocate.like(gamma_) : nb::none(), dbeta_ = beta ? allocate.like(beta_) : nb::none();
    nb::object dresidual_ = residual ? allocate.like(residual_, residual) : nb::none();
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
    set_statistics(problem, mean, mean_lo, rstd, count);
    set_parameters(problem, gamma, beta, activation, slope);
    problem.dgamma = channels(dgamma, problem.C);
    problem.dbeta = channels(dbeta, problem.C);
    problem.measure = false;
    if (!compute_unlocked(Operation::backward, problem)) return nb::none();
    return nb::make_tuple(dx_, dgamma_, dbeta_, dresidual_);
  });
}

}  // namespace batchnorm
