// The formulas: what happens to one vector of elements. Each struct below is one pass over the data; `traverse.hpp`
// walks it along rows or down columns, where its coefficients are those of one channel or of one column each. `arrays`
// says how many it reads or writes in the common forms, `reads` which coefficients.
//
//     d = x - hi                       exact where x lies within a factor of two of hi (Sterbenz)
//     z = scale * d + offset           scale = gamma * rstd, offset = beta - scale * lo: mean = hi + lo
//     y = activation(z + residual)
//     dx = a * (dz - c + b * d)        exactly 0 for one element, whose dz is c
#pragma once

#include "activations.hpp"
#include "loads.hpp"
#include "problem.hpp"

namespace batchnorm::BATCHNORM_ISA {

// `Padding` is the pass over elements that do not count where these are normalised; void where they take no part in it.

// Which lanes of a vector hold elements: all, or the first n.
struct All {};
struct First { int n; };

template <class T> BATCHNORM_INLINE auto load(const T* p, All) { return load(p); }
template <class T> BATCHNORM_INLINE auto load(const T* p, First lanes) { return load(p, lanes.n); }
template <class V> BATCHNORM_INLINE V only(V v, All) { return v; }
template <class V> BATCHNORM_INLINE V only(V v, First lanes) { return select(first_lanes<V>(lanes.n), v, V{}); }
template <class V> BATCHNORM_INLINE MaskOf<V> keep_lanes(const uint8_t* p, All) { return load_mask<V>(p); }
template <class V> BATCHNORM_INLINE MaskOf<V> keep_lanes(const uint8_t* p, First lanes) {
  return load_mask<V>(p, lanes.n);
}

template <class T, class V> BATCHNORM_INLINE void put(T* p, V v, All, bool is_streaming) {
  if (is_streaming) stream(p, v);
  else store(p, v);
}
template <class T, class V> BATCHNORM_INLINE void put(T* p, V v, First lanes, bool) { store(p, v, lanes.n); }

// Where the elements of one row are.
template <class T> struct Row {
  const T *x, *residual, *dy;
  T *out, *dresidual;   // out: y or dx
  const uint8_t* keep;  // of a mask element by element

  // Elements from one place to another in each array; 0 in those that are not there, which stay null.
  struct Step { int64_t x, residual, dy, out, dresidual, keep; };

  BATCHNORM_INLINE Row advanced(const Step& step, int64_t times) const {
    return {x + times * step.x,     residual + times * step.residual,   dy + times * step.dy,
            out + times * step.out, dresidual + times * step.dresidual, keep + times * step.keep};
  }
};

// Tables of coefficients, by channel or by column. In the workspace. Passes name those that they read by their bits.
constexpr unsigned HI = 1, SCALE = 2, OFFSET = 4, BETA = 8, A = 16, B = 32, C = 64;
template <class F> struct Tables { F *hi, *scale, *offset, *beta, *a, *b, *c; };

// What varies between calls but not between elements.
struct Options {
  Activation activation;
  double slope;
  bool has_mask;                // rows carry `keep`
  bool is_padding;              // no element counts, all are normalised
  bool normalized_padding;      // those that do not count are normalised, and have gradients, like the rest
  bool through_statistics;      // backward
  bool* has_unread;             // backward: set where padding is not finite
  bool has_short_runs = false;  // sums are folded into doubles after every addition or two
};

// The passes are compiled for the common forms, for the padding beside the plain one, where it is normalised, and once for
// everything else, which is decided at run time.
enum class Form : uint8_t { plain, relu, relu_residual, plain_padding, general };

// The form of the padding beside a form.
constexpr Form padding_of(Form form) { return form == Form::plain ? Form::plain_padding : Form::general; }

// A coefficient for the lanes of a vector, from channel or column i of its table: `by_channel` for the rows family,
// `by_column` for the others. A pass has its own by `coefficients<by_channel<V>>(i)` or `coefficients<by_column<V>>(i)`.
template <class V> BATCHNORM_INLINE V by_channel(const ScalarOf<V>* table, int64_t channel) {
  return broadcast<V>(table[channel]);
}
template <class V> BATCHNORM_INLINE V by_column(const ScalarOf<V>* table, int64_t column) {
  return load_as<V>(table + column);
}

// p = q = x - hi, with any value near the mean as hi: the sums of p and p * q give the moments.
template <class T, bool is_masked> struct Deviations {
  using V = typename Compute<T>::V;
  using Sum = V;
  using Padding = void;
  Tables<ScalarOf<V>> tables;
  Options options;

  static constexpr bool is_dots = false;
  static constexpr int arrays = 1;
  static constexpr unsigned reads = HI;
  struct Coefficients { V hi; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const { return {fetch(tables.hi, i)}; }

  template <class L>
  BATCHNORM_INLINE void terms(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, V& p, V& q) const {
    V d = only(load(row.x + j, lanes) - k.hi, lanes);
    if constexpr (is_masked) d = select(keep_lanes<V>(row.keep + j, lanes), d, V{});
    p = q = d;
  }
};

// The sums of p = dy, or p = x, and of p * x, of elements that are not converted for it (see `dot`). About zero instead of
// the mean, they cancel where the mean lies many deviations away.
template <class T, bool has_dy> struct Dots;
#if defined(__AVX512BF16__)
template <bool has_dy> struct Dots<bfloat16, has_dy> {
  using T = bfloat16;
  using V = Pair;
  using Sum = Vf;
  using Padding = void;
  Tables<float> tables;

  static constexpr bool is_dots = true;
  static constexpr int arrays = has_dy ? 2 : 1;
  static constexpr unsigned reads = 0;
  struct Coefficients {};
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t) const { return {}; }

  // Of a row: adjacent elements go to one sum.
  template <class L> static BATCHNORM_INLINE void add(const Row<T>& row, int64_t j, L lanes, Vf& first, Vf& second) {
    const Vs x = bits(row.x + j, lanes), p = has_dy ? bits(row.dy + j, lanes) : x;
    first = dot(p, one - Vs{}, first);
    second = dot(p, x, second);
  }

  // Of two rows, or one and none: those below each other, in the order of `interleave`.
  template <class L>
  static BATCHNORM_INLINE void add(const Row<T>& row, const Row<T>& below, int64_t j, L lanes, Pair& first,
                                   Pair& second) {
    const auto both = [=](const T* p, const T* q) __attribute__((always_inline)) {
      return interleave(bits(p + j, lanes), q ? bits(q + j, lanes) : Vs{});
    };
    const PairBits x = both(row.x, below.x), p = has_dy ? both(row.dy, below.dy) : x;
    first = {dot(p.low, one - Vs{}, first.low), dot(p.high, one - Vs{}, first.high)};
    second = {dot(p.low, x.low, second.low), dot(p.high, x.high, second.high)};
  }

 private:
  static constexpr uint16_t one = 0x3f80;
  static BATCHNORM_INLINE Vs bits(const T* p, All) { return load_bits(p); }
  static BATCHNORM_INLINE Vs bits(const T* p, First lanes) { return load_bits(p, lanes.n); }
};
#endif

// Which elements count.
template <class V, class T, class L>
BATCHNORM_INLINE MaskOf<V> kept(const Row<T>& row, int64_t j, const Options& options, L lanes) {
  if (options.is_padding) return MaskOf<V>{};
  return options.has_mask ? keep_lanes<V>(row.keep + j, lanes) : ~MaskOf<V>{};
}

// z where some elements may be padding: NaN there comes out as xhat = 0, and as 0 in the residual.
template <class T, class V, class K, class L>
BATCHNORM_INLINE V padded_z(const Row<T>& row, int64_t j, V d, const K& k, MaskOf<V> keep, L lanes) {
  const V z = select(keep | is_finite(d), fma(k.scale, d, k.offset), k.beta);
  if (!row.residual) return z;
  const V residual = load(row.residual + j, lanes);
  return z + select(keep | is_finite(residual), residual, V{});
}

template <class T> struct Normalized {  // what both directions share
  using V = typename Compute<T>::V;

  template <class L>
  static BATCHNORM_INLINE V z(const Row<T>& row, int64_t j, V d, V scale, V offset, bool has_residual, L lanes) {
    const V z = fma(scale, d, offset);
    return has_residual ? z + load(row.residual + j, lanes) : z;
  }
};

// y = activation(z + residual).
template <class T, Form form> struct Forward {
  using V = typename Compute<T>::V;
  using Padding = Forward<T, padding_of(form)>;
  Tables<ScalarOf<V>> tables;
  Options options;

  static constexpr int arrays = form == Form::relu_residual ? 3 : 2;
  static constexpr unsigned reads = HI | SCALE | OFFSET | (form >= Form::plain_padding ? BETA : 0u);
  struct Coefficients { V hi, scale, offset, beta; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const {
    return {fetch(tables.hi, i), fetch(tables.scale, i), fetch(tables.offset, i), fetch(tables.beta, i)};
  }

  template <class L>
  BATCHNORM_INLINE void apply(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, bool is_streaming) const {
    const V d = load(row.x + j, lanes) - k.hi;
    if constexpr (form == Form::plain_padding)
      return put(row.out + j, select(is_finite(d), fma(k.scale, d, k.offset), k.beta), lanes, is_streaming);
    if constexpr (form < Form::plain_padding) {
      const V z = Normalized<T>::z(row, j, d, k.scale, k.offset, form == Form::relu_residual, lanes);
      return put(row.out + j, form == Form::plain ? z : select(z <= V{}, V{}, z), lanes, is_streaming);
    }
    const MaskOf<V> keep = kept<V>(row, j, options, lanes);
    const V z = padded_z(row, j, d, k, keep, lanes);
    V y = activate(options.activation, z, broadcast<V>(static_cast<ScalarOf<V>>(options.slope)));
    if (!options.normalized_padding) y = select(keep, y, V{});
    put(row.out + j, y, lanes, is_streaming);
  }
};

// dz = dy * activation'(z), from x alone: z is computed again, though by the rounded rstd, where forward has the one
// before it was rounded.
template <class T, Form form> struct Backward {
  using V = typename Compute<T>::V;
  Tables<ScalarOf<V>> tables;
  Options options;

  template <class K, class L> BATCHNORM_INLINE V dz(const Row<T>& row, int64_t j, V d, const K& k, L lanes) const {
    const V dy = load(row.dy + j, lanes);
    if constexpr (form == Form::plain || form == Form::plain_padding) return dy;
    V z = fma(k.scale, d, k.offset);
    if constexpr (form == Form::relu) return select(z <= V{}, V{}, dy);
    if constexpr (form == Form::relu_residual) return select(z + load(row.residual + j, lanes) <= V{}, V{}, dy);
    if constexpr (form == Form::general) {
      const MaskOf<V> keep = kept<V>(row, j, options, lanes);
      if (options.normalized_padding) z = padded_z(row, j, d, k, keep, lanes);
      else if (row.residual) z += load(row.residual + j, lanes);
      const V slope = broadcast<V>(static_cast<ScalarOf<V>>(options.slope));
      z = dy * activation_slope(options.activation, z, slope);
      if (!options.normalized_padding) z = select(keep, z, V{});
    }
    return z;
  }
};

// p = dz and q = x - hi: the sums of p and p * q give dbeta and dgamma. Padding that is normalised but not finite takes no
// part: the statistics do not reach its y. That there is some is noted, as its dz belongs to dbeta.
template <class T, Form form> struct BackwardTerms : Backward<T, form> {
  using V = typename Compute<T>::V;
  using Sum = V;
  using Padding = BackwardTerms<T, padding_of(form)>;

  static constexpr bool is_dots = false;
  static constexpr int arrays = form == Form::relu_residual ? 3 : 2;
  static constexpr unsigned reads = HI | (form == Form::plain || form == Form::plain_padding ? 0u : SCALE | OFFSET) |
                                    (form == Form::general ? BETA : 0u);
  struct Coefficients { V hi, scale, offset, beta; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const {
    const auto& t = this->tables;
    return {fetch(t.hi, i), fetch(t.scale, i), fetch(t.offset, i), fetch(t.beta, i)};
  }

  template <class L>
  BATCHNORM_INLINE void terms(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, V& p, V& q) const {
    const V d = load(row.x + j, lanes) - k.hi;
    p = only(this->dz(row, j, d, k, lanes), lanes);
    q = only(d, lanes);
    if constexpr (form >= Form::plain_padding) {
      const MaskOf<V> keep = kept<V>(row, j, this->options, lanes);
      if (this->options.normalized_padding) {
        const MaskOf<V> is_read = keep | is_finite(d);
        p = select(is_read, p, V{});
        q = select(is_read, q, V{});
        if (any(~is_read)) __atomic_store_n(this->options.has_unread, true, __ATOMIC_RELAXED);
      } else {
        q = select(keep, q, V{});
      }
    }
  }
};

// dx = a * dy + b * x + c, where no mean lies so far from zero that the terms cancel to less than two bytes need.
template <class T> struct FoldedGradient {
  using V = typename Compute<T>::V;
  using Padding = void;
  Tables<ScalarOf<V>> tables;

  static constexpr int arrays = 3;
  static constexpr unsigned reads = A | B | C;
  struct Coefficients { V a, b, c; };
  template <auto fetch> BATCHNORM_INLINE Coefficients coefficients(int64_t i) const {
    return {fetch(tables.a, i), fetch(tables.b, i), fetch(tables.c, i)};
  }

  template <class L>
  BATCHNORM_INLINE void apply(const Row<T>& row, int64_t j, const Coefficients& k, L lanes, bool is_streaming) const {
    put(row.out + j, fma(k.a, load(row.dy + j, lanes), fma(k.b, load(row.x + j, lanes), k.c)), lanes, is_streaming);
  }
};

// dx = a * (dz - c + b * (x - hi)), a * dz of padding, on which the statistics do not depend; and dresidual = dz.
template <class T, Form form> struct Gradient : Backward<T, form> {
  using V = typename Compute<T>::V;
  using Padding = Gradient<T, padding_of(form)>;

  static constexpr int arrays = form == Form::relu_residual ? 5 : 3;
  static constexpr unsigned reads = BackwardTerms<T, form>::reads | A | B | C;
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
    if constexpr (form == Form::plain_padding)
      return put(row.out + j, select(is_finite(d), k.a * dz, V{}), lanes, is_streaming);
    V dx = k.a * fma(k.b, d, dz - k.c);
    if constexpr (form == Form::general) {
      const Options& options = this->options;
      const MaskOf<V> keep = kept<V>(row, j, options, lanes);
      if (!options.through_statistics) dx = k.a * dz;
      dx = select(keep, dx, options.normalized_padding ? select(is_finite(d), k.a * dz, V{}) : V{});
      if (row.out) put(row.out + j, dx, lanes, is_streaming);
      if (options.normalized_padding && row.residual)
        dz = select(keep | is_finite(load(row.residual + j, lanes)), dz, V{});
      if (row.dresidual) put(row.dresidual + j, dz, lanes, is_streaming);
    } else {
      put(row.out + j, dx, lanes, is_streaming);
      if constexpr (form == Form::relu_residual) put(row.dresidual + j, dz, lanes, is_streaming);
    }
  }
};

}  // namespace batchnorm::BATCHNORM_ISA
