// The checks that stand between Python and the kernels: a Problem that comes out of here can be computed without
// reading or writing out of bounds.
#pragma once

#include <memory>

#include "arrays.hpp"
#include "dispatch.hpp"
#include "layout.hpp"

namespace batchnorm {

[[noreturn]] void refuse(const Array& array, const char* problem);

// Raises unless the array has the dtype and shape of x.
void check_like(const Array& array, const Array& x);

// One number for each of C channels, in any floating dtype.
Channels channels(const Array& array, int64_t C);

// The same in the dtype of the statistics of x, contiguous.
void* statistic(const Array& array, int64_t C, Dtype dtype);

void* integers(const Array& array, int64_t length);

// The addresses that an array spans.
struct Extent { const char *begin, *end; };
Extent extent(const Array& array);

// An output may be one of the inputs itself, element for element; any other overlap would be read after it is written.
void check_overlap(const Array& output, const Array& other, bool may_be_same);

// Raises if elements of an output share memory.
void check_writable(const Array& output);

struct Call {
  Problem problem = {};
  Viewed viewed[8];
  int count = 0;

  void add(const Array& array, Tensor& tensor) {
    if (array) viewed[count++] = {&array, &tensor};
  }
};

// Fills in the views, the mask (`keep`: bytes that broadcast to x; `lengths`: for each index of the first reduced axis,
// how many of the second count) and the threads. False if the strides of the arrays fit no kernel.
bool prepare(Call& call, const Array& x, uint32_t kept, const Array& keep, const Array& lengths,
             std::unique_ptr<int64_t[]>& prefixes, int threads);

// What is given for each channel, once `prepare` knows how many there are.
void set_statistics(Problem& problem, const Array& mean, const Array& mean_lo, const Array& rstd);
void set_parameters(Problem& problem, const Array& gamma, const Array& beta, uint8_t activation, double slope);

// `compute` while other Python threads run.
bool compute_unlocked(Operation operation, Problem& problem);

}  // namespace batchnorm
