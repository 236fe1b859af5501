// The activations and their derivatives on vectors. core/activations.py defines them, including infinities and NaN:
// silu(-inf) and gelu(-inf) are NaN (-inf * 0), and so are their derivatives at both infinities.
//
// Largest errors found, in units in the last place, with a fused multiply-add / without (SSE2):
//
//                 exp        sigmoid    tanh       silu       gelu       normal distribution
//     value       0.9 / 1.0  2.4 / 2.4  2.6 / 2.5  3.4 / 3.4  4.5 / 5.3  3.7 / 4.7
//     derivative             2.4 / 2.5  2.4 / 2.5  4.1 / 4.7  5.0 / 6.0
//
// measured on every float of magnitude 2^-27 to 128 against the C library's doubles, and on random doubles against
// quadruple precision. There are two exceptions. Around the zeros of the derivatives of silu and gelu the error is 1.3
// * 2^-24 (2^-53). The product of z and a subnormal exponential has z times the rounding error of the exponential.
//
// Polynomials and quotients are fitted for the least maximal error by Lawson's iteration (least squares with weights
// multiplied by the errors) in 50 digits; the stated errors are those after rounding the coefficients.
#pragma once

#include "pairs.hpp"
#include "problem.hpp"

#if !defined(__AVX2__) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace batchnorm::BATCHNORM_ISA {

// ---- entry points ---------------------------------------------------------------------------------------------

// Activations that need more than one select. Not inlined: one copy for each V instead of one in each kernel.
template <class V> V activate_noinline(Activation activation, V z);
template <class V> V derivative_noinline(Activation activation, V z);

// `z <= 0` rather than `z > 0`, so that NaN gives NaN.
template <class V> BATCHNORM_INLINE V activate(Activation activation, V z, V slope) {
  switch (activation) {
    case Activation::identity: return z;
    case Activation::relu: return z <= V{} ? V{} : z;
    case Activation::leaky_relu: return z <= V{} ? slope * z : z;
    default: return activate_noinline(activation, z);
  }
}

// The derivative of `activate`; at 0, the derivative from the left.
template <class V> BATCHNORM_INLINE V activation_derivative(Activation activation, V z, V slope) {
  switch (activation) {
    case Activation::identity: return broadcast<V>(1);
    case Activation::relu: return z <= V{} ? V{} : broadcast<V>(1);
    case Activation::leaky_relu: return z <= V{} ? slope : broadcast<V>(1);
    default: return derivative_noinline(activation, z);
  }
}

BATCHNORM_INLINE Pair activate(Activation activation, Pair z, Pair slope) {
  return {activate(activation, z.low, slope.low), activate(activation, z.high, slope.high)};
}
BATCHNORM_INLINE Pair activation_derivative(Activation activation, Pair z, Pair slope) {
  return {activation_derivative(activation, z.low, slope.low), activation_derivative(activation, z.high, slope.high)};
}

// True if `fma` rounds once.
#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool has_fma = true;
#else
constexpr bool has_fma = false;
#endif

// ---- building blocks ------------------------------------------------------------------------------------------

// Horner's rule, with coefficients from the highest power down.
template <class V, int count> BATCHNORM_INLINE V polynomial(V x, const ScalarOf<V> (&coefficients)[count]) {
  V value = broadcast<V>(coefficients[0]);
  for (int k = 1; k < count; ++k) value = fma(value, x, broadcast<V>(coefficients[k]));
  return value;
}

// max(x, bound), NaN for NaN. The x86 instructions return their second operand if either is NaN. GCC 12 does not
// generate them from the conditional expression, which costs silu an eighth of its speed.
#if defined(__AVX512F__)
BATCHNORM_INLINE VecF32 at_least(VecF32 x, float bound) { return _mm512_max_ps(broadcast<VecF32>(bound), x); }
BATCHNORM_INLINE VecF64 at_least(VecF64 x, double bound) { return _mm512_max_pd(broadcast<VecF64>(bound), x); }
#elif defined(__AVX2__)
BATCHNORM_INLINE VecF32 at_least(VecF32 x, float bound) { return _mm256_max_ps(broadcast<VecF32>(bound), x); }
BATCHNORM_INLINE VecF64 at_least(VecF64 x, double bound) { return _mm256_max_pd(broadcast<VecF64>(bound), x); }
#elif defined(__SSE2__)
BATCHNORM_INLINE VecF32 at_least(VecF32 x, float bound) { return _mm_max_ps(broadcast<VecF32>(bound), x); }
BATCHNORM_INLINE VecF64 at_least(VecF64 x, double bound) { return _mm_max_pd(broadcast<VecF64>(bound), x); }
#else
template <class V> BATCHNORM_INLINE V at_least(V x, ScalarOf<V> bound) { return x < bound ? broadcast<V>(bound) : x; }
#endif

template <class V> BATCHNORM_INLINE MaskOf<V> sign_bits() { return (MaskOf<V>)-V{}; }
template <class V> BATCHNORM_INLINE V negative_abs(V z) { return (V)((MaskOf<V>)z | sign_bits<V>()); }

// ---- exp ------------------------------------------------------------------------------------------------------

// Adding `round_magic` rounds a number to an integer, which is then in the last bits of the sum. log_2_high has so few
// bits that its product with the exponent of any result is exact without a fused multiply-add. exp is 0 at `lowest`.
// `lift` keeps 2^(n + lift) a normal number where the result is subnormal; `unlift` is 2^-lift.
//
// remainder(r) = (exp(r) - 1 - r) / r^2 for abs(r) <= log(2)/2. Its error is 4.2e-9 relative to exp(r) and 1.7e-8
// relative to exp(r) - 1 for degree 4, and 9e-18 and 2.1e-17 for degree 9.
template <class V> struct Exponential;
template <> struct Exponential<VecF32> {
  static constexpr float lowest = -104;
  static constexpr float log2_e = 0x1.715476p0f, log_2_high = 0x1.62e4p-1f, log_2_low = 0x1.7f7d1cp-20f;
  static constexpr float round_magic = 0x1.8p23f, lift = 32, unlift = 0x1p-32f;
  static constexpr int bias = 127, fraction_bits = 23;
  static constexpr float remainder[] = {0.00138458121f, 0.00836733915f, 0.0416677035f, 0.16666536f, 0.49999997f};
};
template <> struct Exponential<VecF64> {
  static constexpr double lowest = -745.2;
  static constexpr double log2_e = 0x1.71547652b82fep0, log_2_high = 0x1.62e42feep-1, log_2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round_magic = 0x1.8p52, lift = 128, unlift = 0x1p-128;
  static constexpr int bias = 1023, fraction_bits = 52;
  static constexpr double remainder[] = {2.5103347544011312e-08, 2.7626846964527015e-07, 2.7557261116092273e-06,
                                         2.4801503249038469e-05, 0.00019841269868962495, 0.0013888888933232936,
                                         0.0083333333333283841,  0.041666666666571789,   0.16666666666666669,
                                         0.50000000000000056};
};

// x = n * log(2) + r with an integer n and abs(r) <= log(2)/2; power = 2^(n + lift).
template <class V> struct Reduced { V n, r, power; };

template <class V> BATCHNORM_INLINE Reduced<V> reduce(V x, V lift) {
  using E = Exponential<V>;
  const V offset = lift + (E::round_magic + E::bias);
  const V integer = fma(x, broadcast<V>(E::log2_e), offset);
  const V n = integer - offset;
  const V r = fma(n, broadcast<V>(-E::log_2_low), fma(n, broadcast<V>(-E::log_2_high), x));
  return {n, r, (V)((MaskOf<V>)integer << E::fraction_bits)};
}

// exp(r) - 1 for abs(r) <= log(2)/2, with a small relative error near 0 as well.
template <class V> BATCHNORM_INLINE V expm1_reduced(V r) {
  return fma(r * r, polynomial(r, Exponential<V>::remainder), r);
}

// exp(r) for abs(r) <= log(2)/2. Without a fused multiply-add, the second form would add the rounding error of 1 + r *
// remainder to that of the sum.
template <class V> BATCHNORM_INLINE V exp_reduced(V r) {
  if constexpr (!has_fma) return 1 + expm1_reduced(r);
  const V one = broadcast<V>(1);
  return fma(fma(polynomial(r, Exponential<V>::remainder), r, one), r, one);
}

// exp(x - excess) for lowest - 8 <= x <= 0 and a tiny excess. The activations need no other range. Without range checks
// and selects it takes two thirds (AVX-512) to four fifths (AVX2) of the time.
template <class V> BATCHNORM_INLINE V exp_nonpositive(V x, V excess = V{}) {
  using E = Exponential<V>;
  const Reduced<V> reduced = reduce(x, broadcast<V>(E::lift));
  const V value = exp_reduced(reduced.r - excess);
#if defined(__AVX512F__)
  if constexpr (sizeof(ScalarOf<V>) == 4) return _mm512_scalef_ps(value, reduced.n);
  else return _mm512_scalef_pd(value, reduced.n);
#else
  return value * reduced.power * E::unlift;
#endif
}

// exp(-abs(z)).
template <class V> BATCHNORM_INLINE V exp_minus_abs(V z) {
  return exp_nonpositive(at_least(negative_abs(z), Exponential<V>::lowest));
}

// ---- silu, sigmoid, tanh --------------------------------------------------------------------------------------

// 1 / (1 + exp(-z)), with a small relative error in both tails.
template <class V> BATCHNORM_INLINE V sigmoid(V z) {
  const V e = exp_minus_abs(z);
  return (z < V{} ? e : broadcast<V>(1)) / (1 + e);
}

template <class V> BATCHNORM_INLINE V sigmoid_derivative(V z) {
  const V e = exp_minus_abs(z);
  return e / fma(e, 2 + e, broadcast<V>(1));
}

// z * sigmoid(z).
template <class V> BATCHNORM_INLINE V silu(V z) {
  const V e = exp_minus_abs(z);
  return (z < V{} ? z * e : z) / (1 + e);
}

// s + z * s * (1 - s) with s = sigmoid(z), over the common denominator (1 + e)^2.
template <class V> BATCHNORM_INLINE V silu_derivative(V z) {
  const V e = exp_minus_abs(z), d = 1 + e;
  return fma(z, e, z < V{} ? e * d : d) / fma(e, 1 + d, broadcast<V>(1));
}

// m / (2 - m) with m = 1 - exp(-2 * abs(z)), computed as expm1 because it would cancel near 0.
template <class V> BATCHNORM_INLINE V tanh(V z) {
  const V x = negative_abs(z);
  const Reduced<V> reduced = reduce(at_least(x + x, -40), V{});  // 1 - exp(-40) rounds to 1
  const V m = fma(-reduced.power, expm1_reduced(reduced.r), 1 - reduced.power);
  return (V)((MaskOf<V>)(m / (2 - m)) | ((MaskOf<V>)z & sign_bits<V>()));
}

// 1 - tanh(z)^2 would cancel in the tails.
template <class V> BATCHNORM_INLINE V tanh_derivative(V z) { return 4 * sigmoid_derivative(z + z); }

// ---- gelu -----------------------------------------------------------------------------------------------------

// The normal distribution function at -u is exp(-u^2/2) * ratio(u). The rational approximation ratio(u) = p(u) / (p(u)
// * line(u) + s(u)), of degree m over m + 1, is written so that the rounding error of p cancels; line(u) is nearly
// sqrt(2 pi) * u. It holds from 0 to `max_u`, where the exponential is 0. Its relative error is 6.5e-9 for m = 4 and
// 2.5e-18 for m = 10.
template <class V> struct Ratio;
template <> struct Ratio<VecF32> {
  static constexpr float max_u = 14.5;
  static constexpr float line[] = {2.50659919f, 0.00185323134f};
  static constexpr float p[] = {0.00791428983f, 0.0781242251f, 0.352300435f, 0.842695713f, 0.961333215f};
  static constexpr float s[] = {0.0194156375f, 0.199061066f, 0.808219314f, 1.92088485f};
  static constexpr int32_t head_bits = ~0xfff;  // clears the lower half of u, so that its square is exact
};
template <> struct Ratio<VecF64> {
  static constexpr double max_u = 38.75;
  static constexpr double line[] = {2.5066282746304118, 1.5468546173681441e-10};
  static constexpr double p[] = {2.7958195401581444e-07, 8.7022171166508272e-06, 0.00013297566569693954,
                                 0.0012975650603811943,  0.0088909766109118941,  0.044529034636621653,
                                 0.16487733674856159,    0.44626006078548169,    0.84883617107981513,
                                 1.034240371119183,      0.62470449224277358};
  static constexpr double s[] = {7.0080802571396176e-07, 2.1813223716165116e-05, 0.00033191893577528794,
                                 0.0032088871897183449,  0.021626731189533895,   0.10533102015158333,
                                 0.37199202145848198,    0.92631900462119365,    1.4994629373834181,
                                 1.2494089843889145};
  static constexpr int64_t head_bits = ~0x7ffffff;
};

// The normal distribution function at -abs(z), as two factors.
template <class V> struct NormalTail { V exponential, ratio; };

// exp multiplies the rounding error of u^2 by up to u^2/2, so this error is passed on as `excess`. It is known exactly,
// from a fused multiply-add or from the halves of u.
template <class V> BATCHNORM_INLINE NormalTail<V> normal_tail(V z) {
  using R = Ratio<V>;
  using Scalar = ScalarOf<V>;
  const V u = -at_least(negative_abs(z), -R::max_u);
  const V half = Scalar(0.5) * u, exponent = -half * u;
  const V head = (V)((MaskOf<V>)u & R::head_bits), half_rest = half - Scalar(0.5) * head;
  const V excess = has_fma ? fma(half, u, exponent) : (Scalar(0.5) * head * head + exponent) + half_rest * (u + head);
  const V p = polynomial(u, R::p);
  return {exp_nonpositive(exponent, excess), p / fma(p, polynomial(u, R::line), polynomial(u, R::s))};
}

// 0.5 * erfc(-z / sqrt(2)), with a small relative error in the lower tail.
template <class V> BATCHNORM_INLINE V normal_distribution(V z) {
  const NormalTail<V> tail = normal_tail(z);
  const V lower = tail.exponential * tail.ratio;
  return z < V{} ? lower : 1 - lower;
}

template <class V> BATCHNORM_INLINE V gelu(V z) { return z * normal_distribution(z); }

// normal_distribution(z) + z * exp(-z^2/2) / sqrt(2 pi).
template <class V> BATCHNORM_INLINE V gelu_derivative(V z) {
  constexpr ScalarOf<V> density_at_0 = 0.398942280401432678;
  const NormalTail<V> tail = normal_tail(z);
  const V lower = tail.exponential * fma(negative_abs(z), broadcast<V>(density_at_0), tail.ratio);
  return z < V{} ? lower : 1 - lower;
}

// ---- relu6, hardswish -----------------------------------------------------------------------------------------

template <class V> BATCHNORM_INLINE V relu6(V z) { return z <= V{} ? V{} : z >= 6 ? broadcast<V>(6) : z; }
template <class V> BATCHNORM_INLINE V relu6_derivative(V z) { return z <= V{} ? V{} : z >= 6 ? V{} : broadcast<V>(1); }

// z * relu6(z + 3) / 6. Its derivative is 0 at -3 and 1 at 3, as in PyTorch.
template <class V> BATCHNORM_INLINE V hardswish(V z) { return z * relu6(z + 3) / 6; }
template <class V> BATCHNORM_INLINE V hardswish_derivative(V z) {
  constexpr ScalarOf<V> third = ScalarOf<V>(1) / 3, half = 0.5;
  return z <= -3 ? V{} : z >= 3 ? broadcast<V>(1) : fma(z, broadcast<V>(third), broadcast<V>(half));
}

// ---------------------------------------------------------------------------------------------------------------

template <class V> __attribute__((noinline)) V activate_noinline(Activation activation, V z) {
  switch (activation) {
    case Activation::silu: return silu(z);
    case Activation::sigmoid: return sigmoid(z);
    case Activation::tanh: return tanh(z);
    case Activation::gelu: return gelu(z);
    case Activation::relu6: return relu6(z);
    case Activation::hardswish: return hardswish(z);
    default: return z;
  }
}

template <class V> __attribute__((noinline)) V derivative_noinline(Activation activation, V z) {
  switch (activation) {
    case Activation::silu: return silu_derivative(z);
    case Activation::sigmoid: return sigmoid_derivative(z);
    case Activation::tanh: return tanh_derivative(z);
    case Activation::gelu: return gelu_derivative(z);
    case Activation::relu6: return relu6_derivative(z);
    case Activation::hardswish: return hardswish_derivative(z);
    default: return broadcast<V>(1);
  }
}

}  // namespace batchnorm::BATCHNORM_ISA
