// From arrays of any rank to views (N, C, S).
#pragma once

#include "arrays.hpp"
#include "problem.hpp"

namespace batchnorm {

// One array of the problem and the view to be filled in.
struct ArrayView {
  const Array* array;
  Tensor* tensor;
};

// Views the arrays, which have the shape of the first or sizes 1 that broadcast to it, as (N, C, S). `channel_axes` has a bit
// for each axis with statistics of its own; these must merge into C. The others must merge into N and S, in the order
// of the first one's strides, or, with `is_ordered`, so that N is the first of them alone.
//
// False if some array has strides that do not merge.
bool view(const ArrayView* arrays, int count, uint32_t channel_axes, bool is_ordered, Problem& problem);

}  // namespace batchnorm
