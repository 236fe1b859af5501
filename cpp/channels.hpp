// Numbers of single channels, in arrays of any element type.
#pragma once

#include "loads.hpp"
#include "problem.hpp"

namespace batchnorm::BATCHNORM_ISA {

// Reads or writes the number of channel c in an array of any element type.
inline double read_channel(const PerChannel& channels, int64_t c, double absent) {
  if (!channels.data) return absent;
  const int64_t i = c * channels.stride;
  switch (channels.dtype) {
    case Dtype::float64: return load_scalar(static_cast<const double*>(channels.data) + i);
    case Dtype::float32: return load_scalar(static_cast<const float*>(channels.data) + i);
    case Dtype::bfloat16: return load_scalar(static_cast<const bfloat16*>(channels.data) + i);
    default: return load_scalar(static_cast<const float16*>(channels.data) + i);
  }
}

inline void write_channel(const PerChannel& channels, int64_t c, double value) {
  if (!channels.data) return;
  const int64_t i = c * channels.stride;
  const float narrow = static_cast<float>(value);
  switch (channels.dtype) {
    case Dtype::float64: return store(static_cast<double*>(channels.data) + i, broadcast<VecF64>(value), 1);
    case Dtype::float32: return store(static_cast<float*>(channels.data) + i, broadcast<VecF32>(narrow), 1);
    case Dtype::bfloat16: return store(static_cast<bfloat16*>(channels.data) + i, broadcast<Pair>(narrow), 1);
    default: return store(static_cast<float16*>(channels.data) + i, broadcast<Pair>(narrow), 1);
  }
}

// Replaces any NaN by a single one. Which of two NaN a sum or product propagates is up to the compiler at each place
// where the formula is compiled, and a single thread runs other copies of it than several threads do. Without this, the
// bits of a NaN stored for a channel would depend on the number of threads.
inline double with_canonical_nan(double value) { return value == value ? value : __builtin_nan(""); }

}  // namespace batchnorm::BATCHNORM_ISA
