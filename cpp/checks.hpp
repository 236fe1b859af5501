// Checks between Python and the kernels. A Problem that passes them can be computed without reading or writing out of
// bounds; otherwise Declined is thrown.
#pragma once

#include <cassert>
#include <memory>

#include "arrays.hpp"
#include "dispatch.hpp"
#include "layout.hpp"
#include "spec.hpp"

namespace batchnorm {

// Checks that the array has the dtype and shape of x.
void check_like(const Array& array, const Array& x);

// Checks that the array has the sizes of the channel axes of x.
void check_by_channel(const Array& array, const Array& x, uint32_t channel_axes);

// One number for each of C channels, in any floating dtype.
PerChannel per_channel(const Array& array, int64_t C);

// Checks that the mask is boolean and broadcasts to x, and pads it to the rank of x.
void check_mask(Array& mask, const Array& x);

// Checks lengths: for each index of the first axis that is no channel axis, the number of valid indices of the second
// one.
void check_lengths(const Array& lengths, const Array& x, uint32_t channel_axes);

// Checks that elements of an output share no memory with each other (`check_output`) or with an input
// (`check_overlap`). If `may_be_same`, the output may be the input itself, element by element.
void check_output(const Array& output);
void check_overlap(const Array& output, const Array& other, bool may_be_same);

// The views of a call's arrays, to which its Problem refers.
struct Views {
  Problem problem = {};

  void add(const Array& array, Tensor& tensor) {
    if (!array) return;
    assert(count_ < max_views);
    views_[count_++] = {&array, &tensor};
  }

  // Fills in the views, the first of which is x, and the mask or lengths, which must have been checked.
  void finish(const Array& x, uint32_t channel_axes, const Array& mask, const Array& lengths);

 private:
  static constexpr int max_views = 8;  // x, residual, dy, y, dx, dresidual, mask
  ArrayView views_[max_views];
  int count_ = 0;
  std::unique_ptr<int64_t[]> lengths_;
};

// Runs `compute` without the GIL; declines if the strides fit no kernel.
void compute_without_gil(Operation operation, Problem& problem);

}  // namespace batchnorm
