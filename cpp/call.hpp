// One call from Python, in either direction: its arrays are checked, its results allocated, the running statistics advanced.
//
// A batch norm of a megabyte takes 20 microseconds, in which the interpreter, its memory pushed out of the caches by the
// arrays, manages a few dozen steps. So all of it is one call, whatever the convention, the mask or the groups.
#pragma once

#include <nanobind/nanobind.h>

#include "library.hpp"
#include "spec.hpp"

namespace batchnorm {

// (y, entry, running, statistics, count), of which is None what the request does not ask for, or a Refusal, before
// anything is changed.
//
// operands    (x, gamma, beta, residual, mask); the mask is an array, or a tuple of the lengths alone
// numbers     running statistics (mean, spread, steps, weight, ...) or None; for Source::given what normalizes, the
//             mean, mean_lo and rstd in a tuple or as the rows of a table
// entry       of the batch into the running statistics; `running` is what they are after it, where it was accepted
//             and they are not advanced in place
// statistics  (mean, mean_lo, rstd) or what else the request says; the rows of a table are these and, where the spec
//             has one, the factor of the xhat term of dx; of groups one after the other
// count       of elements for each channel; with a table None, where it is the same for all
nanobind::object normalize(const Library& library, const Request& request, const Spec& spec, nanobind::handle operands,
                           nanobind::handle numbers, nanobind::handle out, int threads);

// (dx, dgamma, dbeta, dresidual), None for what is absent and for dx unless it is wanted, or a Refusal.
nanobind::object gradients(const Library& library, const Spec& spec, nanobind::handle dy, nanobind::handle operands,
                           nanobind::handle statistics, nanobind::handle count, bool through_statistics, bool has_dx,
                           int threads);

}  // namespace batchnorm
