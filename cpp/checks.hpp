// The checks that stand between Python and the kernels: a Problem that comes out of here can be computed without
// reading or writing out of bounds. What does not pass throws Declined.
#pragma once

#include <cassert>
#include <memory>

#include "arrays.hpp"
#include "dispatch.hpp"
#include "layout.hpp"
#include "spec.hpp"

namespace batchnorm {

// The array has the dtype and shape of x.
void check_like(const Array& array, const Array& x);

// The array has the sizes of the channel axes of x.
void check_by_channel(const Array& array, const Array& x, uint32_t channel_axes);

// One number for each of C channels, in any floating dtype.
PerChannel per_channel(const Array& array, int64_t C);

// A boolean mask that broadcasts to x, padded to its rank.
void check_mask(Array& mask, const Array& x);

// For each index of the first axis without statistics of its own, how many of the second one count.
void check_lengths(const Array& lengths, const Array& x, uint32_t channel_axes);

// An output whose elements share no memory, neither with each other nor with an input; it may be an input itself,
// element for element, if `may_be_same`.
void check_output(const Array& output);
void check_overlap(const Array& output, const Array& other, bool may_be_same);

// The views of a call's arrays, which its Problem refers to.
struct Views {
  Problem problem = {};

  void add(const Array& array, Tensor& tensor) {
    if (!array) return;
    assert(count_ < max_views);
    views_[count_++] = {&array, &tensor};
  }

  // Fills in the views, the first of which is x, and the checked mask or lengths.
  void finish(const Array& x, uint32_t channel_axes, const Array& mask, const Array& lengths);

 private:
  static constexpr int max_views = 8;  // x, residual, dy, y, dx, dresidual, mask
  ArrayView views_[max_views];
  int count_ = 0;
  std::unique_ptr<int64_t[]> lengths_;
};

// `compute` while other Python threads run; declines where the strides fit no kernel.
void compute_without_gil(Operation operation, Problem& problem);

}  // namespace batchnorm
