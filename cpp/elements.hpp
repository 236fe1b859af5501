// The formulas for one vector of elements. Each struct named below `Form` is one pass over the data. traverse.hpp takes
// a pass along rows, where its coefficients are those of one channel, or down columns, where each column has its own.
//
//     d = x - hi                       exact where x lies within a factor of two of hi (Sterbenz)
//     z = scale * d + offset           scale = gamma * rstd, offset = beta - scale * lo: mean = hi + lo
//     y = activation(z + residual)
//     dx = a * (dz - c + b * d)        exactly 0 for one element, whose dz is c
//
// Members of a pass: `num_arrays` is the number of arrays that it reads or writes in the common forms; `used_tables`
// names its coefficients; `Padding` is the pass over padding (invalid elements) where that is normalized, or void for a
// pass that never takes padding. A reduction computes two terms p and q of each element and sums p and p * q; it sets
// `is_dot` where it adds to the sums itself.
#pragma once

#include "activations.hpp"
#include "loads.hpp"
#include "problem.hpp"

namespace batchnorm::BATCHNORM_ISA {

// The active lanes of a vector, which hold elements: all of them, or the first n.
struct FullVector {};
struct PartialVector { int n; };

template <class T> BATCHNORM_INLINE auto load(const T* p, FullVector) { return load(p); }
template <class T> BATCHNORM_INLINE auto load(const T* p, PartialVector lanes) { return load(p, lanes.n); }
template <class V> BATCHNORM_INLINE V zero_inactive(V v, FullVector) { return v; }
template <class V> BATCHNORM_INLINE V zero_inactive(V v, PartialVector lanes) {
  return select(first_lanes<V>(lanes.n), v, V{});
}
template <class V> BATCHNORM_INLINE MaskOf<V> load_mask(const uint8_t* p, FullVector) { return load_mask<V>(p); }
template <class V> BATCHNORM_INLINE MaskOf<V> load_mask(const uint8_t* p, PartialVector lanes) {
  return load_mask<V>(p, lanes.n);
}

template <class T, class V> BATCHNORM_INLINE void store_or_stream(T* p, V v, FullVector, bool is_streaming) {
  if (is_streaming) stream(p, v);
  else store(p, v);
}
template <class T, class V> BATCHNORM_INLINE void store_or_stream(T* p, V v, PartialVector lanes, bool) {
  store(p, v, lanes.n);
}

// Pointers to the elements of one row; null for absent arrays.
template <class T> struct Row {
  const T *x, *residual, *dy;
  T *out, *dresidual;   // out: y or dx
  const uint8_t* mask;  // the bytes of a mask with a value for each element

  // Distance in elements between two places, in each array; 0 in absent arrays, so that their pointers stay null.
  struct Step { int64_t x, residual, dy, out, dresidual, mask; };

  BATCHNORM_INLINE Row offset_by(const Step& step, int64_t times) const {
    return {x + times * step.x,     residual + times * step.residual,   dy + times * step.dy,
            out + times * step.out, dresidual + times * step.dresidual, mask + times * step.mask};
  }
};

// Tables of coefficients by channel or by column, in the workspace. The bits are used by `used_tables`.
constexpr unsigned use_hi = 1, use_scale = 2, use_offset = 4, use_beta = 8, use_a = 16, use_b = 32, use_c = 64;
template <class F> struct Tables { F *hi, *scale, *offset, *beta, *a, *b, *c; };

// Settings that are the same for all elements of a call.
struct Options {
  Activation activation;
  double slope;
  bool has_mask;                    // `Row::mask` is present
  bool is_padding;                  // all elements are padding and are normalized
  bool normalized_padding;          // padding is normalized and has gradients, like valid elements
  bool through_statistics;          // backward
  bool* has_nonfinite_padding;      // backward: set to true if any padding is not finite
  bool has_frequent_folds = false;  // sums are folded into doubles after one or two additions
};

// Passes are compiled for common forms, for normalized padding without an activation, and once for everything else,
// which is decided at run time.
enum class Form : uint8_t { identity, relu, relu_residual, identity_padding, general };

// The form of the pass over padding, for the form of the pass over valid elements.
constexpr Form padding_of(Form form) { return form == Form::identity ? Form::identity_padding : Form::general; }

// Fetch functions: the coefficients of a vector's lanes from a table, of one channel in the rows family and of
// successive columns in the others. They are the template argument of a pass's `coefficients`.
template <class V> BATCHNORM_INLINE V broadcast_channel(const ScalarOf<V>* table, int64_t channel) {
  return broadcast<V>(table[channel]);
}
template <class V> BATCHNORM_INLINE V load_column(const ScalarOf<V>* table, int64_t column) {
  return load_as<V>(table + column);
}

// p = q = x - hi, with any value near the mean as hi. The sums of p and p * q give the moments.
template <class T, bool is_masked> struct Deviations {
  using V = typename Compute<T>::V;
  using Sum = V;
  using Padding = void;
  Tables<ScalarOf<V>> tables;
  Options options;

  static constexpr bool is_dot = false;
  static constexpr int num_arrays = 1;
  static constexpr unsigned used_tables = use_hi;
  struct Coefficients { V hi; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const { return {fetch(tables.hi, i)}; }

  template <class L>
  BATCHNORM_INLINE void terms(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, V& p, V& q) const {
    V d = zero_inactive(load(row.x + j, lanes) - k.hi, lanes);
    if constexpr (is_masked) d = select(load_mask<V>(row.mask + j, lanes), d, V{});
    p = q = d;
  }
};

// p = dy, or p = x, and q = x, summed without conversion of the elements (see `dot`). These sums are about zero instead
// of the mean, so that they cancel where the mean is many standard deviations away from zero.
template <class T, bool has_dy> struct DotTerms;
#if defined(__AVX512BF16__)
template <bool has_dy> struct DotTerms<bfloat16, has_dy> {
  using T = bfloat16;
  using V = Pair;
  using Sum = VecF32;
  using Padding = void;
  Tables<float> tables;

  static constexpr bool is_dot = true;
  static constexpr int num_arrays = has_dy ? 2 : 1;
  static constexpr unsigned used_tables = 0;
  struct Coefficients {};
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t) const { return {}; }

  // Sums along a row: two adjacent elements go to one sum.
  template <class L>
  static BATCHNORM_INLINE void add(const Row<T>& row, int64_t j, L lanes, VecF32& sum_p, VecF32& sum_pq) {
    const VecU16 x = bits(row.x + j, lanes), p = has_dy ? bits(row.dy + j, lanes) : x;
    sum_p = dot(p, one - VecU16{}, sum_p);
    sum_pq = dot(p, x, sum_pq);
  }

  // Sums down two rows, or one row and none: the elements of a column go to one sum, in the order of `interleave`.
  template <class L>
  static BATCHNORM_INLINE void add(const Row<T>& row, const Row<T>& below, int64_t j, L lanes, Pair& sum_p,
                                   Pair& sum_pq) {
    const auto both = [=](const T* p, const T* q) __attribute__((always_inline)) {
      return interleave(bits(p + j, lanes), q ? bits(q + j, lanes) : VecU16{});
    };
    const Interleaved x = both(row.x, below.x), p = has_dy ? both(row.dy, below.dy) : x;
    sum_p = {dot(p.low, one - VecU16{}, sum_p.low), dot(p.high, one - VecU16{}, sum_p.high)};
    sum_pq = {dot(p.low, x.low, sum_pq.low), dot(p.high, x.high, sum_pq.high)};
  }

 private:
  static constexpr uint16_t one = 0x3f80;
  static BATCHNORM_INLINE VecU16 bits(const T* p, FullVector) { return load_bits(p); }
  static BATCHNORM_INLINE VecU16 bits(const T* p, PartialVector lanes) { return load_bits(p, lanes.n); }
};
#endif

// Mask of the valid elements.
template <class V, class T, class L>
BATCHNORM_INLINE MaskOf<V> valid_lanes(const Row<T>& row, int64_t j, const Options& options, L lanes) {
  if (options.is_padding) return MaskOf<V>{};
  return options.has_mask ? load_mask<V>(row.mask + j, lanes) : ~MaskOf<V>{};
}

// z where some elements may be padding: nonfinite x there gives xhat = 0, and nonfinite residuals count as 0.
template <class T, class V, class K, class L>
BATCHNORM_INLINE V padded_z(const Row<T>& row, int64_t j, V d, const K& k, MaskOf<V> valid, L lanes) {
  const V z = select(valid | is_finite(d), fma(k.scale, d, k.offset), k.beta);
  if (!row.residual) return z;
  const V residual = load(row.residual + j, lanes);
  return z + select(valid | is_finite(residual), residual, V{});
}

// z of valid elements.
template <class T, class V, class L>
BATCHNORM_INLINE V z_of(const Row<T>& row, int64_t j, V d, V scale, V offset, bool has_residual, L lanes) {
  const V z = fma(scale, d, offset);
  return has_residual ? z + load(row.residual + j, lanes) : z;
}

// y = activation(z + residual).
template <class T, Form form> struct Normalize {
  using V = typename Compute<T>::V;
  using Padding = Normalize<T, padding_of(form)>;
  Tables<ScalarOf<V>> tables;
  Options options;

  static constexpr int num_arrays = form == Form::relu_residual ? 3 : 2;
  static constexpr unsigned used_tables =
      use_hi | use_scale | use_offset | (form >= Form::identity_padding ? use_beta : 0u);
  struct Coefficients { V hi, scale, offset, beta; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const {
    return {fetch(tables.hi, i), fetch(tables.scale, i), fetch(tables.offset, i), fetch(tables.beta, i)};
  }

  template <class L>
  BATCHNORM_INLINE void apply(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, bool is_streaming) const {
    const V d = load(row.x + j, lanes) - k.hi;
    if constexpr (form == Form::identity_padding)
      return store_or_stream(row.out + j, select(is_finite(d), fma(k.scale, d, k.offset), k.beta), lanes, is_streaming);
    if constexpr (form < Form::identity_padding) {
      const V z = z_of(row, j, d, k.scale, k.offset, form == Form::relu_residual, lanes);
      return store_or_stream(row.out + j, form == Form::identity ? z : select(z <= V{}, V{}, z), lanes, is_streaming);
    }
    const MaskOf<V> valid = valid_lanes<V>(row, j, options, lanes);
    const V z = padded_z(row, j, d, k, valid, lanes);
    V y = activate(options.activation, z, broadcast<V>(static_cast<ScalarOf<V>>(options.slope)));
    if (!options.normalized_padding) y = select(valid, y, V{});
    store_or_stream(row.out + j, y, lanes, is_streaming);
  }
};

// dz = dy * activation'(z). z is recomputed from x, with the rounded rstd; the forward pass used rstd before rounding.
template <class T, Form form> struct ActivationGradient {
  using V = typename Compute<T>::V;
  Tables<ScalarOf<V>> tables;
  Options options;

  template <class K, class L> BATCHNORM_INLINE V dz(const Row<T>& row, int64_t j, V d, const K& k, L lanes) const {
    const V dy = load(row.dy + j, lanes);
    if constexpr (form == Form::identity || form == Form::identity_padding) return dy;
    V z = fma(k.scale, d, k.offset);
    if constexpr (form == Form::relu) return select(z <= V{}, V{}, dy);
    if constexpr (form == Form::relu_residual) return select(z + load(row.residual + j, lanes) <= V{}, V{}, dy);
    if constexpr (form == Form::general) {
      const MaskOf<V> valid = valid_lanes<V>(row, j, options, lanes);
      if (options.normalized_padding) z = padded_z(row, j, d, k, valid, lanes);
      else if (row.residual) z += load(row.residual + j, lanes);
      const V slope = broadcast<V>(static_cast<ScalarOf<V>>(options.slope));
      z = dy * activation_derivative(options.activation, z, slope);
      if (!options.normalized_padding) z = select(valid, z, V{});
    }
    return z;
  }
};

// p = dz and q = x - hi. The sums of p and p * q give dbeta and dgamma. Normalized padding that is not finite is left
// out, because its y does not depend on the statistics. `has_nonfinite_padding` records it, as its dz belongs to dbeta.
template <class T, Form form> struct GradientTerms : ActivationGradient<T, form> {
  using V = typename Compute<T>::V;
  using Sum = V;
  using Padding = GradientTerms<T, padding_of(form)>;

  static constexpr bool is_dot = false;
  static constexpr int num_arrays = form == Form::relu_residual ? 3 : 2;
  static constexpr unsigned used_tables =
      use_hi | (form == Form::identity || form == Form::identity_padding ? 0u : use_scale | use_offset) |
      (form == Form::general ? use_beta : 0u);
  struct Coefficients { V hi, scale, offset, beta; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const {
    const auto& t = this->tables;
    return {fetch(t.hi, i), fetch(t.scale, i), fetch(t.offset, i), fetch(t.beta, i)};
  }

  template <class L>
  BATCHNORM_INLINE void terms(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, V& p, V& q) const {
    const V d = load(row.x + j, lanes) - k.hi;
    p = zero_inactive(this->dz(row, j, d, k, lanes), lanes);
    q = zero_inactive(d, lanes);
    if constexpr (form >= Form::identity_padding) {
      const MaskOf<V> valid = valid_lanes<V>(row, j, this->options, lanes);
      if (this->options.normalized_padding) {
        const MaskOf<V> is_used = valid | is_finite(d);
        p = select(is_used, p, V{});
        q = select(is_used, q, V{});
        if (any(~is_used)) __atomic_store_n(this->options.has_nonfinite_padding, true, __ATOMIC_RELAXED);
      } else {
        q = select(valid, q, V{});
      }
    }
  }
};

// dx = a * dy + b * x + c, for means so close to zero that the cancellation of terms is below the precision of two
// bytes.
template <class T> struct UncenteredGradient {
  using V = typename Compute<T>::V;
  using Padding = void;
  Tables<ScalarOf<V>> tables;

  static constexpr int num_arrays = 3;
  static constexpr unsigned used_tables = use_a | use_b | use_c;
  struct Coefficients { V a, b, c; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const {
    return {fetch(tables.a, i), fetch(tables.b, i), fetch(tables.c, i)};
  }

  template <class L>
  BATCHNORM_INLINE void apply(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, bool is_streaming) const {
    store_or_stream(row.out + j, fma(k.a, load(row.dy + j, lanes), fma(k.b, load(row.x + j, lanes), k.c)), lanes,
                    is_streaming);
  }
};

// dx = a * (dz - c + b * (x - hi)), or a * dz for padding, on which the statistics do not depend; dresidual = dz.
template <class T, Form form> struct Gradient : ActivationGradient<T, form> {
  using V = typename Compute<T>::V;
  using Padding = Gradient<T, padding_of(form)>;

  static constexpr int num_arrays = form == Form::relu_residual ? 5 : 3;
  static constexpr unsigned used_tables = GradientTerms<T, form>::used_tables | use_a | use_b | use_c;
  struct Coefficients { V hi, scale, offset, beta, a, b, c; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const {
    const auto& t = this->tables;
    return {fetch(t.hi, i), fetch(t.scale, i), fetch(t.offset, i), fetch(t.beta, i),
            fetch(t.a, i),  fetch(t.b, i),     fetch(t.c, i)};
  }

  template <class L>
  BATCHNORM_INLINE void apply(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, bool is_streaming) const {
    const V d = load(row.x + j, lanes) - k.hi;
    V dz = this->dz(row, j, d, k, lanes);
    if constexpr (form == Form::identity_padding)
      return store_or_stream(row.out + j, select(is_finite(d), k.a * dz, V{}), lanes, is_streaming);
    V dx = k.a * fma(k.b, d, dz - k.c);
    if constexpr (form == Form::general) {
      const Options& options = this->options;
      const MaskOf<V> valid = valid_lanes<V>(row, j, options, lanes);
      if (!options.through_statistics) dx = k.a * dz;
      dx = select(valid, dx, options.normalized_padding ? select(is_finite(d), k.a * dz, V{}) : V{});
      if (row.out) store_or_stream(row.out + j, dx, lanes, is_streaming);
      if (options.normalized_padding && row.residual)
        dz = select(valid | is_finite(load(row.residual + j, lanes)), dz, V{});
      if (row.dresidual) store_or_stream(row.dresidual + j, dz, lanes, is_streaming);
    } else {
      store_or_stream(row.out + j, dx, lanes, is_streaming);
      if constexpr (form == Form::relu_residual) store_or_stream(row.dresidual + j, dz, lanes, is_streaming);
    }
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
