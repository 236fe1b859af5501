// Operators on pairs of vectors, with which passes treat the pair of a two-byte element type like one vector of floats.
#pragma once

#include "simd.hpp"

namespace batchnorm::BATCHNORM_ISA {

BATCHNORM_INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
BATCHNORM_INLINE Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
BATCHNORM_INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
BATCHNORM_INLINE Pair& operator+=(Pair& a, Pair b) { return a = a + b; }
BATCHNORM_INLINE Pair fma(Pair a, Pair b, Pair c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }

BATCHNORM_INLINE PairMask operator<=(Pair a, Pair b) { return {a.low <= b.low, a.high <= b.high}; }
BATCHNORM_INLINE PairMask operator==(Pair a, Pair b) { return {a.low == b.low, a.high == b.high}; }
BATCHNORM_INLINE PairMask operator|(PairMask a, PairMask b) { return {a.low | b.low, a.high | b.high}; }
BATCHNORM_INLINE PairMask operator~(PairMask a) { return {~a.low, ~a.high}; }

BATCHNORM_INLINE Pair select(PairMask mask, Pair yes, Pair no) {
  return {select(mask.low, yes.low, no.low), select(mask.high, yes.high, no.high)};
}

template <> BATCHNORM_INLINE Pair broadcast<Pair>(float value) {
  return {broadcast<VecF32>(value), broadcast<VecF32>(value)};
}

template <> BATCHNORM_INLINE PairMask first_lanes<Pair>(int n) {
  return {first_lanes<VecF32>(n), first_lanes<VecF32>(n - width<VecF32>)};
}

template <> BATCHNORM_INLINE PairMask load_mask<Pair>(const uint8_t* p) {
  return {load_mask<VecF32>(p), load_mask<VecF32>(p + width<VecF32>)};
}

}  // namespace batchnorm::BATCHNORM_ISA
