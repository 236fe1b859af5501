// Batch normalization by its formulas: loops over (N, C, S) in double, without vectors and threads. The reference for
// tests of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../problem.hpp"

namespace batchnorm::naive {

inline double widen_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                          : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Element i of an array of any type; read byte by byte, so that no alignment is needed.
inline double get(const void* data, Dtype dtype, int64_t i) {
  const char* at = static_cast<const char*>(data) + i * size_of(dtype);
  double float64;
  float float32;
  uint16_t half;
  switch (dtype) {
    case Dtype::float64: std::memcpy(&float64, at, 8); return float64;
    case Dtype::float32: std::memcpy(&float32, at, 4); return float32;
    case Dtype::float16: std::memcpy(&half, at, 2); return widen_half(half);
    default: break;
  }
  std::memcpy(&half, at, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  std::memcpy(&float32, &bits, 4);
  return float32;
}

// Writes the value rounded towards zero, which is enough for inputs: `get` reads exactly what was written.
inline void put(void* data, Dtype dtype, int64_t i, double value) {
  char* at = static_cast<char*>(data) + i * size_of(dtype);
  const float float32 = static_cast<float>(value);
  uint32_t bits;
  uint16_t half;
  std::memcpy(&bits, &float32, 4);
  switch (dtype) {
    case Dtype::float64: std::memcpy(at, &value, 8); return;
    case Dtype::float32: std::memcpy(at, &float32, 4); return;
    case Dtype::bfloat16: half = static_cast<uint16_t>(bits >> 16); break;
    default: {  // normal numbers only
      const uint32_t magnitude = (bits & 0x7fffffff) >> 13, smallest = 112 << 10;
      half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (magnitude < smallest ? 0 : magnitude - smallest));
    }
  }
  std::memcpy(at, &half, 2);
}

inline double value_of(Activation activation, double slope, double z) {
  switch (activation) {
    case Activation::relu: return z <= 0 ? 0 : z;
    case Activation::leaky_relu: return z <= 0 ? slope * z : z;
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::sigmoid: return 1 / (1 + std::exp(-z));
    case Activation::tanh: return std::tanh(z);
    case Activation::gelu: return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::relu6: return z <= 0 ? 0 : z >= 6 ? 6 : z;
    case Activation::hardswish: return z <= -3 ? 0 : z >= 3 ? z : z * (z + 3) / 6;
    default: return z;
  }
}

inline double slope_of(Activation activation, double slope, double z) {
  const double s = 1 / (1 + std::exp(-z)), t = std::tanh(z);
  switch (activation) {
    case Activation::relu: return z <= 0 ? 0 : 1;
    case Activation::leaky_relu: return z <= 0 ? slope : 1;
    case Activation::silu: return s + z * s * (1 - s);
    case Activation::sigmoid: return s * (1 - s);
    case Activation::tanh: return 1 - t * t;
    case Activation::gelu: return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
    case Activation::relu6: return z <= 0 || z >= 6 ? 0 : 1;
    case Activation::hardswish: return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
    default: return 1;
  }
}

// The points at which the derivative jumps.
inline std::vector<double> kinks_of(Activation activation) {
  switch (activation) {
    case Activation::relu:
    case Activation::leaky_relu: return {0};
    case Activation::relu6: return {0, 6};
    case Activation::hardswish: return {-3, 3};
    default: return {};
  }
}

struct Results {
  std::vector<double> mean, var, rstd, xhat_scale, dgamma, dbeta;  // by channel
  std::vector<int64_t> count;
  std::vector<double> y, z, dz, dx, dresidual;  // [n][c][s]
};

inline bool is_valid(const Problem& p, int64_t n, int64_t c, int64_t s) {
  if (p.mask.lengths) return s < p.mask.lengths[n];
  const Tensor& mask = p.mask.bytes;
  return !mask.data || static_cast<const uint8_t*>(mask.data)[n * mask.n + c * mask.c + s * mask.s];
}

// Forward and, if dy is present, backward. Without `computes_moments`, mean (with mean_lo) and rstd are read from the
// problem.
inline Results results(const Problem& p) {
  Results r;
  const auto at = [&](const Tensor& t, int64_t n, int64_t c, int64_t s) {
    return get(t.data, p.dtype, n * t.n + c * t.c + s * t.s);
  };
  const auto parameter = [](const PerChannel& a, int64_t c, double absent) {
    return a.data ? get(a.data, a.dtype, c * a.stride) : absent;
  };
  const Dtype statistic = p.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  r.y.resize(p.N * p.C * p.S), r.z = r.dz = r.dx = r.dresidual = r.y;
  for (int64_t c = 0; c < p.C; ++c) {
    const auto each = [&](const auto& body) {
      for (int64_t n = 0; n < p.N; ++n)
        for (int64_t s = 0; s < p.S; ++s) body(n, s, (n * p.C + c) * p.S + s, is_valid(p, n, c, s));
    };
    int64_t count = 0;
    double sum = 0, m2 = 0;
    each([&](int64_t n, int64_t s, int64_t, bool is_valid) {
      if (is_valid) ++count, sum += at(p.x, n, c, s);
    });
    const double n_valid = static_cast<double>(std::max<int64_t>(count, 1));
    double mean = sum / n_valid;
    each([&](int64_t n, int64_t s, int64_t, bool is_valid) {
      if (is_valid) m2 += std::pow(at(p.x, n, c, s) - mean, 2);
    });
    const double divisor = std::max(n_valid - p.forward.correction, 1.0), var = m2 / divisor;
    double std = p.forward.eps_placement == EpsPlacement::inside ? std::sqrt(var + p.forward.eps) : std::sqrt(var);
    if (p.forward.eps_placement == EpsPlacement::outside) std += p.forward.eps;
    double rstd = std == 0 ? 0 : 1 / std;
    if (!p.forward.computes_moments)
      mean = get(p.mean, statistic, c) + get(p.mean_lo, statistic, c), rstd = get(p.rstd, statistic, c);
    const double gamma = parameter(p.gamma, c, 1), beta = parameter(p.beta, c, 0);
    double dgamma = 0, dbeta = 0,
           dshift = 0;  // dshift: the sum of dz over elements whose xhat depends on the statistics
    each([&](int64_t n, int64_t s, int64_t i, bool is_valid) {
      const double x = at(p.x, n, c, s), residual = p.residual.data ? at(p.residual, n, c, s) : 0;
      const bool is_read = is_valid || p.normalized_padding;
      const double xhat = is_read && (is_valid || std::isfinite(x)) ? (x - mean) * rstd : 0;
      r.z[i] = gamma * xhat + beta + (is_valid || std::isfinite(residual) ? residual : 0);
      r.y[i] = is_read ? value_of(p.activation, p.slope, r.z[i]) : 0;
      if (!p.backward.dy.data || !is_read) return;
      const double dz = at(p.backward.dy, n, c, s) * slope_of(p.activation, p.slope, r.z[i]);
      dbeta += dz, dgamma += dz * xhat, dshift += is_valid || std::isfinite(x) ? dz : 0;
      r.dz[i] = dz, r.dresidual[i] = is_valid || std::isfinite(residual) ? dz : 0;
    });
    const double xhat_scale = p.backward.dy.data && p.xhat_scale ? get(p.xhat_scale, statistic, c) : 1;
    if (p.backward.dy.data)
      each([&](int64_t n, int64_t s, int64_t i, bool is_valid) {
        const double x = at(p.x, n, c, s), xhat = (x - mean) * rstd, dz = r.dz[i];
        if (!is_valid && !(p.normalized_padding && std::isfinite(x))) return;
        const bool is_through = is_valid && p.backward.through_statistics;
        r.dx[i] = gamma * rstd * (is_through ? dz - dshift / n_valid - xhat_scale * xhat * dgamma / n_valid : dz);
      });
    r.mean.push_back(mean), r.var.push_back(m2 / n_valid), r.rstd.push_back(rstd), r.count.push_back(count);
    r.xhat_scale.push_back(n_valid / divisor *
                           (p.forward.eps_placement == EpsPlacement::outside && var > 0 ? std / std::sqrt(var) : 1));
    r.dgamma.push_back(dgamma), r.dbeta.push_back(dbeta);
  }
  return r;
}

}  // namespace batchnorm::naive
