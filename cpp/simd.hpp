// Vectors of the widest kind that the instruction set being compiled for has, and how the four element types get in
// and out of them. Arithmetic is the compiler's own on vector types (GCC and Clang); only what it has no operator
// for is spelled out per instruction set.
//
// Everything lives in a namespace named after the instruction set: this header is compiled once for each, and two
// versions of one inline function under one name would let the linker keep the one that the machine cannot run. For
// the same reason nothing here calls a function template of the standard library.
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

typedef float Vf __attribute__((vector_size(vector_bytes)));
typedef double Vd __attribute__((vector_size(vector_bytes)));
typedef int32_t Vi __attribute__((vector_size(vector_bytes)));
typedef int64_t Vl __attribute__((vector_size(vector_bytes)));
typedef uint32_t Vu __attribute__((vector_size(vector_bytes)));
typedef uint16_t Vh __attribute__((vector_size(vector_bytes / 2)));

// The type that elements are computed in, its vector, and the vector of its lanes' truth values (all bits or none).
template <class T> struct Compute { using Scalar = float; using V = Vf; };
template <> struct Compute<double> { using Scalar = double; using V = Vd; };
template <class V> struct Lanes;
template <> struct Lanes<Vf> { using Scalar = float; using Int = int32_t; using Mask = Vi; };
template <> struct Lanes<Vd> { using Scalar = double; using Int = int64_t; using Mask = Vl; };
template <class V> using MaskOf = typename Lanes<V>::Mask;
template <class V> using ScalarOf = typename Lanes<V>::Scalar;
template <class V> constexpr int width = sizeof(V) / sizeof(ScalarOf<V>);

#define BATCHNORM_INLINE inline __attribute__((always_inline))

template <class V> BATCHNORM_INLINE V broadcast(ScalarOf<V> value) { return value - V{}; }  // + would lose -0.0

template <class V> BATCHNORM_INLINE V select(MaskOf<V> mask, V yes, V no) { return mask ? yes : no; }

// The lanes before the n-th.
template <class V> BATCHNORM_INLINE MaskOf<V> first_lanes(int n) {
  MaskOf<V> index;
  for (int lane = 0; lane < width<V>; ++lane) index[lane] = lane;
  return index < (static_cast<typename Lanes<V>::Int>(n) - MaskOf<V>{});
}

// a * b + c, rounded once where the machine can.
BATCHNORM_INLINE Vf fma(Vf a, Vf b, Vf c) {
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

BATCHNORM_INLINE Vd fma(Vd a, Vd b, Vd c) {
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
struct Halves { Vd low, high; };

BATCHNORM_INLINE Halves widen(Vf v) {
#if defined(__AVX512F__)
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(high)};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
#else
  return {Vd{v[0], v[1]}, Vd{v[2], v[3]}};
#endif
}

// ---- elements in and out of vectors; no pointer needs any alignment -------------------------------------------

BATCHNORM_INLINE Vf load(const float* p) { Vf v; __builtin_memcpy(&v, p, sizeof v); return v; }
BATCHNORM_INLINE Vd load(const double* p) { Vd v; __builtin_memcpy(&v, p, sizeof v); return v; }
BATCHNORM_INLINE Vh load_bits(const void* p) { Vh v; __builtin_memcpy(&v, p, sizeof v); return v; }

BATCHNORM_INLINE Vu zero_extend(Vh bits) {
#if defined(__AVX512F__)
  return (Vu)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (Vu)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Vu);
#endif
}

BATCHNORM_INLINE Vh truncate(Vu bits) {
#if defined(__AVX512F__)
  return (Vh)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (Vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(bits, Vh);
#endif
}

BATCHNORM_INLINE Vf widen_bfloat16(Vh bits) { return (Vf)(zero_extend(bits) << 16); }

// Round to nearest, ties to even. A NaN keeps its upper bits and is made quiet: rounding would carry it to infinity
// or zero. (The vcvtneps2bf16 instruction is not used: it flushes subnormal numbers to zero.)
BATCHNORM_INLINE Vh narrow_bfloat16(Vf v) {
  const Vu bits = (Vu)v;
  const Vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vu quiet = (bits >> 16) | 0x40;
  return truncate(v == v ? rounded : quiet);
}

BATCHNORM_INLINE Vf widen_float16(Vh bits) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)bits);
#else
  // The exponent and fraction moved to a float's place are 2^112 too small, subnormal numbers included; Inf and NaN
  // have an exponent of their own.
  const Vu h = zero_extend(bits);
  const Vu magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  const Vf scaled = (Vf)magnitude * 0x1p112f;
  const Vu special = magnitude | 0x7f800000;
  return (Vf)(((h & 0x7c00) == 0x7c00 ? special : (Vu)scaled) | sign);
#endif
}

BATCHNORM_INLINE Vh narrow_float16(Vf v) {
#if defined(__AVX512F__)
  return (Vh)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vh)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vu bits = (Vu)v, sign = bits & 0x80000000, magnitude = bits ^ sign;
  // Subnormal results: adding 0.5 leaves the rounded number in the low bits of the sum, in units of 2^-24.
  const Vu subnormal = (Vu)((Vf)magnitude + 0.5f) - 0x3f000000;
  const Vu normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  Vu half = magnitude < 0x38800000 ? subnormal : normal;             // below 2^-14
  half = magnitude >= 0x477ff000 ? Vu{} + 0x7c00 : half;              // 65520 and above round to Inf
  half = magnitude > 0x7f800000 ? ((magnitude >> 13) & 0x3ff) | 0x7e00 : half;  // NaN
  return truncate(half | (sign >> 16));
#endif
}

BATCHNORM_INLINE Vf load(const bfloat16* p) { return widen_bfloat16(load_bits(p)); }
BATCHNORM_INLINE Vf load(const float16* p) { return widen_float16(load_bits(p)); }

BATCHNORM_INLINE void store(float* p, Vf v) { __builtin_memcpy(p, &v, sizeof v); }
BATCHNORM_INLINE void store(double* p, Vd v) { __builtin_memcpy(p, &v, sizeof v); }
BATCHNORM_INLINE void store_bits(void* p, Vh v) { __builtin_memcpy(p, &v, sizeof v); }
BATCHNORM_INLINE void store(bfloat16* p, Vf v) { store_bits(p, narrow_bfloat16(v)); }
BATCHNORM_INLINE void store(float16* p, Vf v) { store_bits(p, narrow_float16(v)); }

// The first n elements, the other lanes 0; nothing beyond them is touched.
template <class T> BATCHNORM_INLINE typename Compute<T>::V load(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else if constexpr (sizeof(T) == 8) return (Vd)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#endif
  T lanes[width<typename Compute<T>::V>] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T> BATCHNORM_INLINE void store(T* p, typename Compute<T>::V v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#endif
  T lanes[width<typename Compute<T>::V>];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// A store past the cache; p must be aligned to what it writes. A plain store where the machine has none.
template <class T> BATCHNORM_INLINE void stream(T* p, typename Compute<T>::V v) {
  constexpr int bytes = width<typename Compute<T>::V> * sizeof(T);
#if defined(__AVX2__)
  alignas(64) T lanes[width<typename Compute<T>::V>];
  store(lanes, v);
  if constexpr (bytes == 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)p, *(const __m512i*)lanes);
#endif
  } else if constexpr (bytes == 32) {
    _mm256_stream_si256((__m256i*)p, *(const __m256i*)lanes);
  } else {
    _mm_stream_si128((__m128i*)p, *(const __m128i*)lanes);
  }
#else
  static_assert(bytes > 0);
  store(p, v);
#endif
}

// What follows a sequence of `stream`: other threads see it before anything that is written later.
BATCHNORM_INLINE void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Lanes whose byte is not 0, among the first n.
template <class V> BATCHNORM_INLINE MaskOf<V> load_mask(const uint8_t* p) {
  MaskOf<V> mask;
  for (int lane = 0; lane < width<V>; ++lane) mask[lane] = p[lane] ? -1 : 0;
  return mask;
}
template <class V> BATCHNORM_INLINE MaskOf<V> load_mask(const uint8_t* p, int n) {
  uint8_t bytes[width<V>] = {};
  __builtin_memcpy(bytes, p, n);
  return load_mask<V>(bytes);
}

template <class V> BATCHNORM_INLINE MaskOf<V> is_finite(V v) { return (v - v) == V{}; }

// The sum of all lanes, pairwise in a fixed order.
BATCHNORM_INLINE double total(Vd v) {
  double lanes[width<Vd>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = width<Vd> / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

}  // namespace batchnorm::BATCHNORM_ISA
