// Vectors of the widest type of the instruction set. Arithmetic uses the compiler's operators on vector types (GCC and
// Clang), and intrinsics only where no operator exists.
//
// All headers from this one up to kernels.cpp are in a namespace named after the instruction set and call nothing of
// the standard library; kernels.cpp explains why.
#pragma once

#include <cstdint>

#include "dtypes.hpp"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace batchnorm::BATCHNORM_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

typedef float VecF32 __attribute__((vector_size(vector_bytes)));
typedef double VecF64 __attribute__((vector_size(vector_bytes)));
typedef int32_t VecI32 __attribute__((vector_size(vector_bytes)));
typedef int64_t VecI64 __attribute__((vector_size(vector_bytes)));
typedef uint32_t VecU32 __attribute__((vector_size(vector_bytes)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(vector_bytes / 2)));
typedef uint16_t VecU16 __attribute__((vector_size(vector_bytes)));

// As many floats as a vector of two-byte elements holds. Two-byte elements are loaded and stored as whole vectors, so
// that one store fills a cache line with AVX-512. The operators are in pairs.hpp.
struct Pair { VecF32 low, high; };
struct PairMask { VecI32 low, high; };

// The type in which elements are computed, its vector, and the vector of its lane masks (all bits set, or none).
// clang-format off
template <class T> struct Compute { using Scalar = float; using V = Pair; };
template <> struct Compute<float> { using Scalar = float; using V = VecF32; };
template <> struct Compute<double> { using Scalar = double; using V = VecF64; };
template <class V> struct Lanes;
template <> struct Lanes<VecF32> { using Scalar = float; using Int = int32_t; using Mask = VecI32; };
template <> struct Lanes<VecF64> { using Scalar = double; using Int = int64_t; using Mask = VecI64; };
template <> struct Lanes<Pair> { using Scalar = float; using Int = int32_t; using Mask = PairMask; };
// clang-format on
template <class V> using MaskOf = typename Lanes<V>::Mask;
template <class V> using ScalarOf = typename Lanes<V>::Scalar;
template <class V> constexpr int width = sizeof(V) / sizeof(ScalarOf<V>);

#define BATCHNORM_INLINE inline __attribute__((always_inline))

template <class V> BATCHNORM_INLINE V broadcast(ScalarOf<V> value) {
  return value - V{};
}  // value + V{} would turn -0.0 into 0.0

template <class V> BATCHNORM_INLINE V select(MaskOf<V> mask, V yes, V no) { return mask ? yes : no; }

// Mask of the first n lanes.
template <class V> BATCHNORM_INLINE MaskOf<V> first_lanes(int n) {
  MaskOf<V> index;
  for (int lane = 0; lane < width<V>; ++lane) index[lane] = lane;
  return index < (static_cast<typename Lanes<V>::Int>(n) - MaskOf<V>{});
}

// a * b + c, rounded once where the instruction set has a fused multiply-add.
BATCHNORM_INLINE VecF32 fma(VecF32 a, VecF32 b, VecF32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

BATCHNORM_INLINE VecF64 fma(VecF64 a, VecF64 b, VecF64 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The two halves of a vector of floats, as doubles.
struct Halves { VecF64 low, high; };

BATCHNORM_INLINE Halves widen(VecF32 v) {
#if defined(__AVX512F__)
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(high)};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
#else
  return {VecF64{v[0], v[1]}, VecF64{v[2], v[3]}};
#endif
}

BATCHNORM_INLINE VecF32 load(const float* p) {
  VecF32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
BATCHNORM_INLINE VecF64 load(const double* p) {
  VecF64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
BATCHNORM_INLINE void store(float* p, VecF32 v) { __builtin_memcpy(p, &v, sizeof v); }
BATCHNORM_INLINE void store(double* p, VecF64 v) { __builtin_memcpy(p, &v, sizeof v); }

// Mask of the lanes whose byte is not 0; with n, of the first n lanes, without reading any byte after them.
template <class V> BATCHNORM_INLINE MaskOf<V> load_mask(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(width<V>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, MaskOf<V>) != 0;
}
template <class V> BATCHNORM_INLINE MaskOf<V> load_mask(const uint8_t* p, int n) {
  uint8_t bytes[width<V>] = {};
  __builtin_memcpy(bytes, p, n);
  return load_mask<V>(bytes);
}

// True if any bit of the mask is set.
template <class M> BATCHNORM_INLINE bool any(M mask) {
  uint64_t words[sizeof mask / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

template <class V> BATCHNORM_INLINE MaskOf<V> is_finite(V v) { return (v - v) == V{}; }

// Sum of all lanes, pairwise in a fixed order.
BATCHNORM_INLINE double sum_lanes(VecF64 v) {
  double lanes[width<VecF64>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = width<VecF64> / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

}  // namespace batchnorm::BATCHNORM_ISA
