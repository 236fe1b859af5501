// The task of a kernel: plain numbers and pointers, the same for every instruction set, checked by the caller.
#pragma once

#include <cstdint>

#include "dtypes.hpp"
#include "external_pool.hpp"

namespace batchnorm {

enum class Activation : uint8_t { identity, relu, leaky_relu, silu, sigmoid, tanh, gelu, relu6, hardswish };
enum class EpsPlacement : uint8_t { inside, outside, absent };

// sqrt(var + eps), sqrt(var) + eps, or sqrt(var). Always inlined, like everything that several instruction sets share.
inline __attribute__((always_inline)) double std_from_var(double var, double eps, EpsPlacement placement) {
  if (placement == EpsPlacement::inside) return __builtin_sqrt(var + eps);
  return __builtin_sqrt(var) + (placement == EpsPlacement::outside ? eps : 0);
}

// A view (N, C, S): outer, channel, inner. Strides are in elements, of any sign; no alignment is assumed.
struct Tensor {
  void* data = nullptr;  // null: absent
  int64_t n = 0, c = 0, s = 0;
};

// One number for each channel, of any element type; no alignment is assumed.
struct PerChannel {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;
};

// Which elements are valid; the others are padding. At most one of the two is present; without either, all elements are
// valid.
struct Mask {
  const int64_t* lengths = nullptr;  // for each n, the number of leading valid s; in 0..S
  Tensor bytes = {};                 // nonzero for valid elements; stride 0 along broadcast dimensions
};

// Arguments of the forward pass only.
struct ForwardArgs {
  Tensor y = {};                 // written; null: only the moments are computed
  bool computes_moments = true;  // and normalizes by these moments, which are written; otherwise by given statistics
  double eps = 0;
  EpsPlacement eps_placement = EpsPlacement::inside;
  int correction = 0;  // x is normalized by the variance m2 / max(count - correction, 1)
  void* m2 = nullptr;  // written
};

// Arguments of the backward pass only.
struct BackwardArgs {
  Tensor dy = {};
  Tensor dx = {}, dresidual = {};      // written; null: not computed
  bool through_statistics = true;      // the statistics depend on x; if not, dx = gamma * rstd * dz
  PerChannel dgamma = {}, dbeta = {};  // written; null: not computed
};

struct Problem {
  Dtype dtype;
  int64_t N, C, S;
  Mask mask = {};
  int threads = 1;
  const ExternalPool* pool = nullptr;  // null: OpenMP
  bool has_uncached_results = false;   // results are freshly allocated memory that is not in a cache

  // Arrays of the shape of x, with one common layout: s (or N = S = 1) has stride 1 in all of them, or c has.
  Tensor x, residual = {};
  ForwardArgs forward = {};
  BackwardArgs backward = {};

  Activation activation = Activation::identity;
  double slope = 0;  // for leaky_relu
  // Padding is normalized and has gradients like valid elements; otherwise its y is 0.
  bool normalized_padding = false;
  PerChannel gamma = {}, beta = {};  // null: 1 and 0

  // One number for each channel, contiguous, of any alignment; float, or double for float64. Forward writes them if it
  // computes moments, and otherwise reads mean, mean_lo and rstd; backward reads them.
  void *mean = nullptr, *mean_lo = nullptr, *rstd = nullptr;
  void* count = nullptr;  // int64; null: N * S for every channel
  // Factor of the xhat term of dx: count / (count - correction), times (std + eps) / std for eps outside the root;
  // null: 1.
  void* xhat_scale = nullptr;
};

struct Plan;

// The compiled kernels of one instruction set.
struct Kernels {
  const char* name;

  // y = activation(gamma * (x - mean) * rstd + beta + residual), and with `computes_moments` the statistics.
  void (*forward)(const Problem&, const Plan&, void* workspace);

  // dz = dy * activation'(z); dbeta = sum(dz), dgamma = sum(dz * xhat), dresidual = dz, and dx. dx is also the
  // forward-mode derivative J(dy), because the Jacobian with respect to x is symmetric (but not with normalized
  // padding).
  void (*backward)(const Problem&, const Plan&, void* workspace);

  // to[c] = from[c], rounded to its type, for each of C channels.
  void (*convert)(const PerChannel& from, const PerChannel& to, int64_t C);
};

}  // namespace batchnorm
