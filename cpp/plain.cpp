// Calls without a mask that nothing is unusual about.
#include "plain.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <type_traits>

#include "checks.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

// How results are allocated: `empty_like(array)`, unless in memory of our own.
struct Allocator {
  handle empty_like;

  nb::object like(handle array_, const Array& array) const {
    nb::object result = own_like(array_, array);
    return result ? result : empty_like(array_);
  }

  // One number for each channel: like the prototype or, for None, in the library of x.
  nb::object table(handle prototype, handle x, Element element, int64_t C) const {
    return prototype.is_none() ? table_for(x, element, C) : empty_like(prototype);
  }
};

// mean, mean_lo and rstd between a forward and a backward pass: rows of one table, or an array each.
class KeptStatistics {
 public:
  KeptStatistics(handle statistics, bool is_written)
      : is_table_(!PyTuple_Check(statistics.ptr())),
        mean_(is_table_ ? "statistics" : "mean", is_table_ ? statistics : item(statistics, 0), is_written),
        mean_lo_("mean_lo", is_table_ ? nb::none() : item(statistics, 1), is_written),
        rstd_("rstd", is_table_ ? nb::none() : item(statistics, 2), is_written) {}

  void enter(Problem& problem) const {
    if (!is_table_) return set_statistics(problem, mean_, mean_lo_, rstd_);
    char* const rows = static_cast<char*>(statistic(mean_, 3 * problem.C, problem.dtype));
    const int64_t row = problem.C * (problem.dtype == Dtype::float64 ? 8 : 4);
    problem.mean = rows, problem.mean_lo = rows + row, problem.rstd = rows + 2 * row;
  }

 private:
  static nb::object item(handle tuple, Py_ssize_t i) {
    if (PyTuple_GET_SIZE(tuple.ptr()) != 3) throw nb::value_error("statistics must be a table or mean, mean_lo and rstd");
    return nb::borrow(PyTuple_GET_ITEM(tuple.ptr(), i));
  }

  bool is_table_;
  Array mean_, mean_lo_, rstd_;
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

// An array with one number for each channel, in float32 or float64.
bool is_state(const Array& array, int64_t C) {
  const bool is_wide = array.element == Element::float32 || array.element == Element::float64;
  return array && is_wide && array.has_whole_strides && array.ndim == 1 && array.shape[0] == C;
}

// Running statistics that a forward pass advances in place; steps and weight where they are kept.
class State {
 public:
  State(handle mean, handle spread, handle steps, handle weight)
      : mean_("running_mean", mean, true), spread_("running_spread", spread, true), steps_("steps", steps, true),
        weight_("weight", weight, true) {}

  explicit operator bool() const { return static_cast<bool>(mean_); }

  // Whether they are as this file takes them, and hold what the average needs.
  bool fits(const Averaging& averaging, int64_t C) const {
    const bool needs_steps = averaging.is_cumulative || averaging.debias == Debias::first_batch;
    const bool needs_weight = averaging.debias == Debias::adam || averaging.debias == Debias::weight_sum;
    return is_state(mean_, C) && is_state(spread_, C) && (steps_ ? is_scalar(steps_) : !needs_steps) &&
           (weight_ ? is_scalar(weight_) : !needs_weight);
  }

  // By the batch that a forward pass has measured; false where it is refused.
  bool advance(const Problem& problem, const Averaging& averaging) const {
    const Dtype wide = problem.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
    Batch batch{{problem.mean, wide, 1}, {problem.mean_lo, wide, 1}, {problem.m2, wide, 1}};
    batch.shared_count = problem.N * problem.S;
    Running running{channels(mean_, problem.C), channels(spread_, problem.C)};
    if (steps_) running.steps = number(steps_);
    if (weight_) running.weight = number(weight_);
    if (batchnorm::advance(running, batch, averaging, problem.C) != Entry::accepted) return false;
    if (steps_) set_number(steps_, running.steps);
    if (weight_) set_number(weight_, running.weight);
    return true;
  }

 private:
  static bool is_scalar(const Array& array) {
    return array.size() == 1 && (array.element <= Element::float64 || array.element == Element::int64);
  }
  static double number(const Array& array) {
    if (array.element == Element::int64) return static_cast<double>(element_at<int64_t>(array.data, 0));
    return value_at({array.data, array.dtype(), 1}, 0);
  }
  static void set_number(const Array& array, double value) {
    if (array.element == Element::int64) set_element(array.data, 0, static_cast<int64_t>(value));
    else set_value({array.data, array.dtype(), 1}, 0, value);
  }

  Array mean_, spread_, steps_, weight_;
};

// mean, what rounding takes of it, and rstd, one for each of C channels, in double and rounded once. False for values
// that are no statistics.
template <class F>
bool fill_statistics(const Channels& mean, const Channels& var, double eps, EpsPlacement placement, int64_t C,
                     F* means, F* means_lo, F* rstds) {
  for (int64_t c = 0; c < C; ++c) {
    const double m = value_at(mean, c), v = value_at(var, c);
    const double std = placement == EpsPlacement::inside ? std::sqrt(v + eps)
                                                         : std::sqrt(v) + (placement == EpsPlacement::outside ? eps : 0);
    if (!(std > 0)) return false;
    means[c] = static_cast<F>(m);
    means_lo[c] = static_cast<F>(m - means[c]);
    rstds[c] = static_cast<F>(1 / std);
  }
  return true;
}

}  // namespace

nb::object forward_plain(handle x_, handle gamma_, handle beta_, handle residual_, handle out_, int axis, double eps,
                         uint8_t activation, double slope, int threads, handle empty_like, handle statistic_like,
                         handle count_like, handle running_mean, handle running_spread, handle steps, handle weight,
                         const Averaging* averaging, bool in_table, bool has_output) {
  return or_none([&]() -> nb::object {
    const Array x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_), none("mask", nb::none());
    if (!is_plain(x, axis, eps, {&gamma, &beta})) return nb::none();
    if (residual) check_like(residual, x);
    const State state(running_mean, running_spread, steps, weight);
    const int64_t C = x.shape[axis], n = x.size() / C;
    if (n <= 1) return nb::none();  // conventions differ
    if (state && !(averaging && state.fits(*averaging, C))) return nb::none();
    const Allocator allocate{empty_like};
    const Element wide = x.element == Element::float64 ? Element::float64 : Element::float32;
    nb::object y_ = nb::none(), statistics_, count_ = nb::none();
    if (has_output) y_ = out_.is_none() ? allocate.like(x_, x) : nb::borrow(out_);
    if (in_table) {
      statistics_ = table_for(x_, wide, C, 3);
    } else {
      const auto statistic = [&] { return allocate.table(statistic_like, x_, wide, C); };
      statistics_ = nb::make_tuple(statistic(), statistic(), statistic());
      count_ = allocate.table(count_like, x_, Element::int64, C);
    }
    const Array y("y", y_, true), count("count", count_, true);
    const KeptStatistics statistics(statistics_, true);
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
    statistics.enter(problem);
    problem.count = integers(count, C);
    set_parameters(problem, gamma, beta, activation, slope);
    problem.eps = eps;
    const std::unique_ptr<double[]> m2(new double[state ? C : 0]);
    if (state) problem.m2 = m2.get();
    if (!compute_unlocked(Operation::forward, problem)) return nb::none();
    nb::object is_accepted = nb::none();
    if (state) is_accepted = nb::bool_(state.advance(problem, *averaging));
    return nb::make_tuple(y_, statistics_, count_, is_accepted);
  });
}

nb::object inference_plain(handle x_, handle gamma_, handle beta_, handle residual_, handle mean_, handle var_, int axis,
                           double eps, uint8_t eps_placement, uint8_t activation, double slope, int threads,
                           handle empty_like, bool keeps_statistics, bool has_output) {
  return or_none([&]() -> nb::object {
    const Array x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_), none("mask", nb::none());
    const Array mean("mean", mean_), var("var", var_);
    if (!is_plain(x, axis, eps, {&gamma, &beta, &mean, &var})) return nb::none();
    if (!is_state(mean, x.shape[axis]) || !is_state(var, x.shape[axis])) return nb::none();
    if (residual) check_like(residual, x);
    const Allocator allocate{empty_like};
    nb::object y_ = has_output ? allocate.like(x_, x) : nb::none();
    const Array y("y", y_, true);
    Call call;
    Problem& problem = call.problem;
    call.add(x, problem.x);
    call.add(y, problem.y);
    call.add(residual, problem.residual);
    std::unique_ptr<int64_t[]> prefixes;
    if (!prepare(call, x, 1u << axis, none, none, prefixes, threads)) return nb::none();
    const int64_t C = problem.C;
    const bool is_double = problem.dtype == Dtype::float64;
    const std::unique_ptr<double[]> own(new double[keeps_statistics ? 0 : 3 * C]);
    nb::object kept = keeps_statistics ? table_for(x_, is_double ? Element::float64 : Element::float32, C, 3) : nb::none();
    const Array table("statistics", kept, true);
    const auto fill = [&](auto* rows) {
      const auto placement = static_cast<EpsPlacement>(eps_placement);
      problem.mean = rows, problem.mean_lo = rows + C, problem.rstd = rows + 2 * C;
      return fill_statistics(channels(mean, C), channels(var, C), eps, placement, C, rows, rows + C, rows + 2 * C);
    };
    void* const rows = keeps_statistics ? table.data : own.get();
    if (!(is_double ? fill(static_cast<double*>(rows)) : fill(static_cast<float*>(rows)))) return nb::none();
    set_parameters(problem, gamma, beta, activation, slope);
    problem.measure = false;
    if (has_output && !compute_unlocked(Operation::forward, problem)) return nb::none();
    return nb::make_tuple(y_, kept);
  });
}

nb::object backward_plain(handle dy_, handle x_, handle gamma_, handle beta_, handle residual_, handle statistics_,
                          handle count_, uint32_t kept, uint8_t activation, double slope, int threads,
                          handle empty_like, bool has_dx, bool through_statistics) {
  return or_none([&]() -> nb::object {
    const Array dy("dy", dy_), x("x", x_), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_);
    const Array count("count", count_), none("mask", nb::none());
    const KeptStatistics statistics(statistics_, false);
    if (x.size() == 0) return nb::none();
    check_like(dy, x);
    if (residual) check_like(residual, x);
    const Allocator allocate{empty_like};
    nb::object dx_ = has_dx ? allocate.like(x_, x) : nb::none();
    nb::object dgamma_ = gamma ? allocate.like(gamma_, gamma) : nb::none();
    nb::object dbeta_ = beta ? allocate.like(beta_, beta) : nb::none();
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
    statistics.enter(problem);
    problem.count = integers(count, problem.C);
    set_parameters(problem, gamma, beta, activation, slope);
    problem.dgamma = channels(dgamma, problem.C);
    problem.dbeta = channels(dbeta, problem.C);
    problem.measure = false;
    problem.through_statistics = through_statistics;
    if (!compute_unlocked(Operation::backward, problem)) return nb::none();
    return nb::make_tuple(dx_, dgamma_, dbeta_, dresidual_);
  });
}

}  // namespace batchnorm
