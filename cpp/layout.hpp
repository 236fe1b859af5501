// Conversion of arrays of any rank to views (N, C, S).
#pragma once

#include "arrays.hpp"
#include "problem.hpp"

namespace batchnorm {

// One array of the problem, and the view to be filled in.
struct ArrayView {
  const Array* array;
  Tensor* tensor;
};

// Views the arrays as (N, C, S). They have the shape of the first one, or sizes 1 that broadcast to it. `channel_axes`
// has a bit for each channel axis; these axes must merge into C. The others must merge into N and S, in the order of
// the strides of the first array, or, with `is_ordered`, so that N is the first of them alone.
//
// Returns false if the strides of an array do not merge.
bool view(const ArrayView* arrays, int count, uint32_t channel_axes, bool is_ordered, Problem& problem);

}  // namespace batchnorm
