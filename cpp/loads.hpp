// Loads and stores of the four element types as vectors. No pointer needs alignment, except that of `stream`.
#pragma once

#include "pairs.hpp"

namespace batchnorm::BATCHNORM_ISA {

// ---- two bytes to four ---------------------------------------------------------------------------------------------

BATCHNORM_INLINE VecU32 zero_extend(HalfVecU16 bits) {
#if defined(__AVX512F__)
  return (VecU32)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (VecU32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, VecU32);
#endif
}

BATCHNORM_INLINE VecF32 widen(HalfVecU16 bits, bfloat16) { return (VecF32)(zero_extend(bits) << 16); }

BATCHNORM_INLINE VecF32 widen(HalfVecU16 bits, float16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)bits);
#else
  // Exponent and fraction, shifted to their places in a float, give a value that is 2^112 too small, also for subnormal
  // numbers. Inf and NaN get the largest exponent of a float instead.
  const VecU32 h = zero_extend(bits);
  const VecU32 magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
  const VecF32 scaled = (VecF32)magnitude * 0x1p112f;
  const VecU32 special = magnitude | 0x7f800000;
  return (VecF32)(((h & 0x7c00) == 0x7c00 ? special : (VecU32)scaled) | sign);
#endif
}

// ---- four bytes to two: to nearest, ties to even -------------------------------------------------------------------

// The upper two bytes of each lane (`lower_halves`: the lower two), in the order of the lanes.
BATCHNORM_INLINE VecU16 upper_halves(VecU32 low, VecU32 high) {
#if defined(__AVX512F__)
  VecU16 odd;
  for (int i = 0; i < 32; ++i) odd[i] = static_cast<uint16_t>(2 * i + 1);
  return (VecU16)_mm512_permutex2var_epi16((__m512i)low, (__m512i)odd, (__m512i)high);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)(low >> 16), (__m256i)(high >> 16));
  return (VecU16)_mm256_permute4x64_epi64(packed, 0xd8);
#elif defined(__aarch64__)
  return vuzp2q_u16((uint16x8_t)low, (uint16x8_t)high);
#else
  return __builtin_shufflevector((VecU16)low, (VecU16)high, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}
[[maybe_unused]] BATCHNORM_INLINE VecU16 lower_halves(VecU32 low, VecU32 high) {
  return upper_halves(low << 16, high << 16);
}

BATCHNORM_INLINE bool has_nan(Pair v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v.low, v.high, _CMP_UNORD_Q);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v.low, v.high, _CMP_UNORD_Q));
#else
  const VecI64 any = (VecI64)((v.low != v.low) | (v.high != v.high));
  return any[0] | any[1];
#endif
}

// A NaN keeps its upper bits and becomes quiet; rounding would carry its bits to infinity or zero.
BATCHNORM_INLINE VecU16 narrow(Pair v, bfloat16) {
#if defined(__AVX512BF16__)
  // One instruction instead of nine, used only without subnormal numbers because it flushes these to zero.
  constexpr int subnormal = 0x20;
  const auto subnormals = _mm512_fpclass_ps_mask(v.low, subnormal) | _mm512_fpclass_ps_mask(v.high, subnormal);
  if (__builtin_expect(subnormals == 0, true)) return (VecU16)_mm512_cvtne2ps_pbh(v.high, v.low);
#endif
  const auto rounded = [](VecF32 v) __attribute__((always_inline)) {
    const VecU32 bits = (VecU32)v;
    return bits + 0x7fff + (bits >> 16 & 1);
  };
  VecU32 low = rounded(v.low), high = rounded(v.high);
  if (__builtin_expect(has_nan(v), false)) {
    low = v.low == v.low ? low : (VecU32)v.low | 0x400000;
    high = v.high == v.high ? high : (VecU32)v.high | 0x400000;
  }
  return upper_halves(low, high);
}

BATCHNORM_INLINE VecU16 narrow(Pair v, float16) {
#if defined(__AVX512F__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(v.low, nearest));
  return (VecU16)_mm512_inserti64x4(low, _mm512_cvtps_ph(v.high, nearest), 1);
#elif defined(__AVX2__)
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return (VecU16)_mm256_set_m128i(_mm256_cvtps_ph(v.high, nearest), _mm256_cvtps_ph(v.low, nearest));
#else
  const auto narrowed = [](VecF32 v) {
    const VecU32 bits = (VecU32)v, sign = bits & 0x80000000, magnitude = bits ^ sign;
    // Subnormal results: adding 0.5 leaves the rounded number in the low bits of the sum, in units of 2^-24.
    const VecU32 subnormal = (VecU32)((VecF32)magnitude + 0.5f) - 0x3f000000;
    const VecU32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Results are subnormal below 2^-14 and Inf from 65520 on; bits above those of Inf are NaN.
    VecU32 half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? VecU32{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? ((magnitude >> 13) & 0x3ff) | 0x7e00 : half;
    return half | (sign >> 16);
  };
  return lower_halves(narrowed(v.low), narrowed(v.high));
#endif
}

// ---- loads and stores ----------------------------------------------------------------------------------------------

template <class T> BATCHNORM_INLINE Pair load_pair(const T* p) {
  HalfVecU16 low, high;
  __builtin_memcpy(&low, p, sizeof low);
  __builtin_memcpy(&high, p + width<VecF32>, sizeof high);
  return {widen(low, T{}), widen(high, T{})};
}
BATCHNORM_INLINE Pair load(const bfloat16* p) { return load_pair(p); }
BATCHNORM_INLINE Pair load(const float16* p) { return load_pair(p); }

template <class T> BATCHNORM_INLINE void store_pair(T* p, Pair v) {
  const VecU16 bits = narrow(v, T{});
  __builtin_memcpy(p, &bits, sizeof bits);
}
BATCHNORM_INLINE void store(bfloat16* p, Pair v) { store_pair(p, v); }
BATCHNORM_INLINE void store(float16* p, Pair v) { store_pair(p, v); }

// Loads floats or doubles as V, the vector of a computation.
template <class V> BATCHNORM_INLINE V load_as(const ScalarOf<V>* p) {
  if constexpr (sizeof(V) > vector_bytes) return {load(p), load(p + width<VecF32>)};
  else return load(p);
}
BATCHNORM_INLINE void store(float* p, Pair v) { store(p, v.low), store(p + width<VecF32>, v.high); }

// Copies n elements, fewer than a vector has, in pieces of fixed sizes: a copy of variable size is a function call.
template <class T> BATCHNORM_INLINE void copy_lanes(T* to, const T* from, int n) {
#pragma GCC unroll 6
  for (int piece = width<typename Compute<T>::V> / 2; piece; piece /= 2)
    if (n & piece) {
      __builtin_memcpy(to, from, piece * sizeof(T));
      to += piece, from += piece;
    }
}

// The first n elements; the other lanes are 0. Memory after them is not accessed.
template <class T> BATCHNORM_INLINE typename Compute<T>::V load(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (VecF32)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else if constexpr (sizeof(T) == 8) return (VecF64)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) {
    static constexpr int32_t mask_words[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const __m256i mask = _mm256_loadu_si256((const __m256i*)(mask_words + 8 - n * (sizeof(T) / 4)));
    if constexpr (sizeof(T) == 4) return (VecF32)_mm256_maskload_ps(p, mask);
    else return (VecF64)_mm256_maskload_pd(p, mask);
  }
#else
  if constexpr (sizeof(T) >= 4) {  // a load of lanes that were stored one by one would wait for all of these stores
    typename Compute<T>::V v = {};
    for (int lane = 0; lane < width<typename Compute<T>::V> - 1; ++lane)
      if (lane < n) v[lane] = element_at<T>(p, lane);
    return v;
  }
#endif
  alignas(64) T lanes[width<typename Compute<T>::V>] = {};
  copy_lanes(lanes, p, n);
  return load(lanes);
}

template <class T> BATCHNORM_INLINE void store(T* p, typename Compute<T>::V v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
  else return _mm512_mask_storeu_epi16(p, (__mmask32)((1ull << n) - 1), (__m512i)narrow(v, T{}));
#endif
  alignas(64) T lanes[width<typename Compute<T>::V>];
  store(lanes, v);
  copy_lanes(p, lanes, n);
}

template <class V> BATCHNORM_INLINE ScalarOf<V> first_lane(V v) {
  if constexpr (sizeof(V) > vector_bytes) return v.low[0];
  else return v[0];
}

// One element, converted to the type of the computation.
template <class T> BATCHNORM_INLINE auto load_scalar(const T* p) {
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen(bits - HalfVecU16{}, T{})[0];
  } else {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
  }
}

// Streaming store; p must be aligned to the bytes stored. A plain store where the instruction set has none.
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

// ---- dot products of bfloat16, without conversion, with AVX512_BF16 ------------------------------------------------

#if defined(__AVX512BF16__)
template <class T> constexpr bool has_dot = false;
template <> constexpr bool has_dot<bfloat16> = true;

// sums[i] + p[2 * i] * q[2 * i] + p[2 * i + 1] * q[2 * i + 1], with subnormal numbers taken as zeros.
BATCHNORM_INLINE VecF32 dot(VecU16 p, VecU16 q, VecF32 sums) {
  return (VecF32)_mm512_dpbf16_ps((__m512)sums, (__m512bh)p, (__m512bh)q);
}

BATCHNORM_INLINE VecU16 load_bits(const bfloat16* p) {
  VecU16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
BATCHNORM_INLINE VecU16 load_bits(const bfloat16* p, int n) {
  return (VecU16)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}

// Interleaves two vectors: p[0] q[0] p[1] q[1] ...; groups of four of each go alternately to `low` and `high`.
struct Interleaved { VecU16 low, high; };
BATCHNORM_INLINE Interleaved interleave(VecU16 p, VecU16 q) {
  return {(VecU16)_mm512_unpacklo_epi16((__m512i)p, (__m512i)q), (VecU16)_mm512_unpackhi_epi16((__m512i)p, (__m512i)q)};
}

// Sums over interleaved vectors, put back in the order of the elements.
BATCHNORM_INLINE Pair deinterleave(Pair v) {
  const VecI32 low = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23}, high = low + 8;
  return {(VecF32)_mm512_permutex2var_ps((__m512)v.low, (__m512i)low, (__m512)v.high),
          (VecF32)_mm512_permutex2var_ps((__m512)v.low, (__m512i)high, (__m512)v.high)};
}
#else
template <class T> constexpr bool has_dot = false;
#endif

// Ends a sequence of calls of `stream`: other threads see these stores before any later store.
BATCHNORM_INLINE void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace batchnorm::BATCHNORM_ISA
