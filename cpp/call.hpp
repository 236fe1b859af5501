// One call from Python in either direction: checks of the arrays, allocation of the results, computation, and the
// update of the running statistics.
//
// A batch norm of a megabyte takes 20 microseconds. In this time the interpreter, whose memory the arrays have evicted
// from the caches, runs a few dozen steps. So a batch norm is a single call, with any convention, mask or groups.
#pragma once

#include <nanobind/nanobind.h>

#include "library.hpp"
#include "spec.hpp"

namespace batchnorm {

// Returns (y, outcome, running, statistics, count), with None for items that the request does not ask for; or a
// Refusal, before anything is changed.
//
// operands    (x, gamma, beta, residual, mask); the mask is an array, or a tuple with the lengths only
// numbers     running statistics (mean, spread, steps, weight, ...) or None; for Source::given the statistics that
//             normalize: mean, mean_lo and rstd in a tuple or as the rows of a table
// outcome     of the update of the running statistics
// running     the updated running statistics, if the update was accepted and is not in place
// statistics  (mean, mean_lo, rstd), or what the request names; the rows of a table are these and, if the spec has
//             one, the factor of the xhat term of dx; the statistics of groups follow each other
// count       of elements for each channel; with a table, None if it is the same for all channels
nanobind::object normalize(const Library& library, const Request& request, const Spec& spec, nanobind::handle operands,
                           nanobind::handle numbers, nanobind::handle out, int threads);

// Returns (dx, dgamma, dbeta, dresidual), with None for absent operands and for dx unless `has_dx`; or a Refusal.
nanobind::object gradients(const Library& library, const Spec& spec, nanobind::handle dy, nanobind::handle operands,
                           nanobind::handle statistics, nanobind::handle count, bool through_statistics, bool has_dx,
                           int threads);

}  // namespace batchnorm
