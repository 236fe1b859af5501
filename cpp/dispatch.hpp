// Choice of the compiled kernels and of the number of threads.
#pragma once

#include <string>
#include <vector>

#include "plan.hpp"

namespace batchnorm {

// The kernels that are compiled in and that this machine supports, the best first.
std::vector<const Kernels*> supported_kernels();

// The kernels in use.
const Kernels& chosen_kernels();

// Chooses kernels by name; null or empty: the best ones. Throws std::invalid_argument for an unknown or unsupported
// name.
void choose_kernels(const char* name);

// The number of threads of calls that do not set it; initially that of OpenMP (OMP_NUM_THREADS, or the number of
// cores).
int num_threads();
void set_num_threads(int threads);

enum class Operation { forward, backward };

// Runs the kernels. Returns false if the strides fit no kernel; throws std::bad_alloc.
bool compute(Operation operation, Problem& problem);

}  // namespace batchnorm
