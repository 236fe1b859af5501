// Which compiled kernels run, and on how many threads.
#pragma once

#include <string>
#include <vector>

#include "plan.hpp"

namespace batchnorm {

// The instruction sets that are compiled in and that this machine has, the best first.
std::vector<const Kernels*> supported_kernels();

// Those in use.
const Kernels& chosen_kernels();

// By name; the best for null or nothing. Throws std::invalid_argument if there are none of that name.
void choose_kernels(const char* name);

// The number of threads for calls that do not say; at first OpenMP's own (OMP_NUM_THREADS, or the cores).
int num_threads();
void set_num_threads(int threads);

enum class Operation { forward, backward };

// Computes. False if the strides fit no kernel; throws std::bad_alloc.
bool compute(Operation operation, Problem& problem);

}  // namespace batchnorm
