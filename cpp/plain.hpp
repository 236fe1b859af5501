// Calls without a mask that nothing is unusual about, and whether the arguments are so is found out on the way.
//
// A batch norm of a megabyte takes 20 microseconds, in which the interpreter, its memory pushed out of the caches by the
// arrays, manages a few dozen steps. So here a call is checked, its results are allocated and it is computed, in one go.
// Where anything is out of the ordinary, or wrong, None comes back: the long way sees to it and says so.
#pragma once

#include <nanobind/nanobind.h>

#include "running.hpp"

namespace batchnorm {

// y, the statistics, the counts, and whether the batch entered the running statistics, where those are given: they are
// advanced in place, as `averaging` says, with the steps and the weight that are given beside them. Results come from
// `empty_like(array)`, large ones from memory.hpp where they can. The statistics are mean, mean_lo and rstd, arrays like
// the prototype or, for None, of our own, and the counts likewise; or, `in_table`, rows of one array, without counts. y is
// `out` where that is given, and None without `has_output`, for which x is measured and nothing else.
nanobind::object forward_plain(nanobind::handle x, nanobind::handle gamma, nanobind::handle beta,
                               nanobind::handle residual, nanobind::handle out, int axis, double eps,
                               uint8_t activation, double slope, int threads, nanobind::handle empty_like,
                               nanobind::handle statistic_like, nanobind::handle count_like,
                               nanobind::handle running_mean, nanobind::handle running_spread, nanobind::handle steps,
                               nanobind::handle weight, const Averaging* averaging, bool in_table, bool has_output);

// y by running statistics, and the mean, mean_lo and rstd that these are as rows of one array, if they are kept; without
// `has_output` those alone.
nanobind::object inference_plain(nanobind::handle x, nanobind::handle gamma, nanobind::handle beta,
                                 nanobind::handle residual, nanobind::handle mean, nanobind::handle var, int axis,
                                 double eps, uint8_t eps_placement, uint8_t activation, double slope, int threads,
                                 nanobind::handle empty_like, bool keeps_statistics, bool has_output);

// dx, dgamma, dbeta, dresidual, by what `forward_plain` returned; None for those of what was not given, and for dx where
// it is not wanted.
nanobind::object backward_plain(nanobind::handle dy, nanobind::handle x, nanobind::handle gamma, nanobind::handle beta,
                                nanobind::handle residual, nanobind::handle statistics, nanobind::handle count,
                                uint32_t kept, uint8_t activation, double slope, int threads,
                                nanobind::handle empty_like, bool has_dx, bool through_statistics);

}  // namespace batchnorm
