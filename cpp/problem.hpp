// What a kernel is asked to do: plain numbers and pointers, the same for every instruction set, checked by the caller.
#pragma once

#include <cstdint>

#include "dtypes.hpp"
#include "external_pool.hpp"

namespace batchnorm {

enum class Activation : uint8_t { identity, relu, leaky_relu, silu, sigmoid, tanh, gelu, relu6, hardswish };
enum class EpsPlacement : uint8_t { inside, outside, absent };

// sqrt(var + eps), sqrt(var) + eps, or sqrt(var). Always inlined, as everything that several instruction sets share.
inline __attribute__((always_inline)) double std_from_var(double var, double eps, EpsPlacement placement) {
  if (placement == EpsPlacement::inside) return __builtin_sqrt(var + eps);
  return __builtin_sqrt(var) + (placement == EpsPlacement::outside ? eps : 0);
}

// A view (N, C, S): outer, channel, inner. Strides in elements, of any sign; no alignment is assumed.
struct Tensor {
  void* data = nullptr;  // null: not there
  int64_t n = 0, c = 0, s = 0;
};

// One number for each channel, of any element type; no alignment is assumed.
struct PerChannel {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride = 0;
};

// Which elements count. At most one of the two is given; neither: all of them.
struct Mask {
  const int64_t* lengths = nullptr;  // for each n, how many leading s count; in 0..S
  Tensor bytes = {};                 // bytes, not 0 where an element counts; stride 0 along what they broadcast over
};

// Of a forward pass alone.
struct ForwardArgs {
  Tensor y = {};                 // written; null: x is only measured
  bool computes_moments = true;  // normalize by the moments of x, which are returned, rather than by given statistics
  double eps = 0;
  EpsPlacement eps_placement = EpsPlacement::inside;
  int correction = 0;  // the variance that normalizes is m2 / max(count - correction, 1)
  void* m2 = nullptr;  // written
};

// Of a backward pass alone.
struct BackwardArgs {
  Tensor dy = {};
  Tensor dx = {}, dresidual = {};      // written; null where they are not wanted
  bool through_statistics = true;      // the statistics depend on x; if not, dx = gamma * rstd * dz
  PerChannel dgamma = {}, dbeta = {};  // written; null where they are not wanted
};

struct Problem {
  Dtype dtype;
  int64_t N, C, S;
  Mask mask = {};
  int threads = 1;
  const ExternalPool* pool = nullptr;  // null: OpenMP
  bool has_uncached_results = false;   // each call writes where no call has for a while: in no cache

  // Arrays of the shape of x. They share one layout: s (or N = S = 1) is the unit stride of all, or c is.
  Tensor x, residual = {};
  ForwardArgs forward = {};
  BackwardArgs backward = {};

  Activation activation = Activation::identity;
  double slope = 0;  // of leaky_relu
  // Masked elements are normalized like the rest, and have gradients: y is not 0 there.
  bool normalized_padding = false;
  PerChannel gamma = {}, beta = {};  // null: 1 and 0

  // One for each channel, contiguous, of any alignment; float, or double for float64. Forward writes them if it measures
  // and reads mean, mean_lo and rstd if not; backward reads them.
  void *mean = nullptr, *mean_lo = nullptr, *rstd = nullptr;
  void* count = nullptr;  // int64; null: N * S for every channel
  // Of the xhat term of dx: count / (count - correction), for eps outside the root times (std + eps) / std; null: 1.
  void* xhat_scale = nullptr;
};

struct Plan;

// The compiled kernels of one instruction set.
struct Kernels {
  const char* name;

  // y = activation(gamma * (x - mean) * rstd + beta + residual), and with `computes_moments` the statistics.
  void (*forward)(const Problem&, const Plan&, void* workspace);

  // dz = dy * activation'(z); dbeta = sum(dz), dgamma = sum(dz * xhat), dresidual = dz, and dx, which is also
  // J(dy), the forward-mode derivative: the Jacobian with respect to x is symmetric (not with normalised padding).
  void (*backward)(const Problem&, const Plan&, void* workspace);

  // `to` = `from`, rounded, for each of C channels.
  void (*convert)(const PerChannel& from, const PerChannel& to, int64_t C);
};

}  // namespace batchnorm
