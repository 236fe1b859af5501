// The kernels as targets of XLA's foreign function interface on the CPU: arrays are viewed here, and nothing is computed.
//
// Arrays are dense and row-major: those of the shape of x are (L, N, C, S) or (L, N, C), with L lanes that are batch norms of
// their own, and those with a number for each channel (L, C). What is not there has one dimension. Nothing is checked that the
// primitives in kernels/jax.py have put together, but for what would read or write out of bounds.
#include "xla.hpp"

#include <algorithm>
#include <new>
#include <vector>

#include "dispatch.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace batchnorm {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

bool is_there(const Buffer& buffer) { return buffer.dimensions().size() > 1; }

bool dtype_of(const Buffer& buffer, Dtype& dtype) {
  switch (buffer.element_type()) {
    case ffi::F32: dtype = Dtype::float32; return true;
    case ffi::F64: dtype = Dtype::float64; return true;
    case ffi::F16: dtype = Dtype::float16; return true;
    case ffi::BF16: dtype = Dtype::bfloat16; return true;
    default: return false;
  }
}

// The problem of one lane after the other.
class Lanes {
 public:
  explicit Lanes(const Buffer& x) {
    const auto sizes = x.dimensions();
    is_valid_ = (sizes.size() == 3 || sizes.size() == 4) && dtype_of(x, problem.dtype);
    if (!is_valid_) return;
    count = sizes[0];
    problem.N = sizes[1], problem.C = sizes[2], problem.S = sizes.size() == 4 ? sizes[3] : 1;
    is_double_ = problem.dtype == Dtype::float64;
  }

  Problem problem = {};
  int64_t count = 0;

  bool is_valid() const { return is_valid_; }

  void large(const Buffer& buffer, Tensor& tensor) {
    if (!is_there(buffer)) return;
    Dtype dtype;
    check(dtype_of(buffer, dtype) && dtype == problem.dtype && static_cast<int64_t>(buffer.element_count()) == count * size());
    tensor = {buffer.untyped_data(), problem.C * problem.S, problem.S, 1};
    strides_.push_back({&tensor.data, size() * size_of(problem.dtype)});
  }

  // A mask broadcasts over the channels, or has one byte for each element.
  void mask(const Buffer& buffer) {
    if (!is_there(buffer)) return;
    const auto sizes = buffer.dimensions();
    check(buffer.element_type() == ffi::PRED && sizes.size() >= 3 && sizes[0] == count && sizes[1] == problem.N);
    if (!is_valid_) return;
    const int64_t channels = sizes[2];
    check((channels == 1 || channels == problem.C) &&
          static_cast<int64_t>(buffer.element_count()) == count * problem.N * channels * problem.S);
    Tensor& keep = problem.mask.keep;
    keep = {buffer.untyped_data(), channels * problem.S, channels == 1 ? 0 : problem.S, 1};
    strides_.push_back({&keep.data, channels * problem.N * problem.S});
  }

  void parameter(const Buffer& buffer, Channels& channels) {
    if (!is_there(buffer)) return;
    channels.stride = 1;
    check(dtype_of(buffer, channels.dtype) && static_cast<int64_t>(buffer.element_count()) == count * problem.C);
    channels.data = buffer.untyped_data();
    strides_.push_back({&channels.data, problem.C * size_of(channels.dtype)});
  }

  void statistic(const Buffer& buffer, void*& table) {
    check(buffer.element_type() == (is_double_ ? ffi::F64 : ffi::F32) && static_cast<int64_t>(buffer.element_count()) == count * problem.C);
    table = buffer.untyped_data();
    strides_.push_back({&table, problem.C * (is_double_ ? 8 : 4)});
  }

  // Counts are int32 there and int64 here.
  void counts(const Buffer& buffer) {
    if (!is_there(buffer)) return;
    check(buffer.element_type() == ffi::S32 && static_cast<int64_t>(buffer.element_count()) == count * problem.C);
    counts_ = static_cast<int32_t*>(buffer.untyped_data());
    wide_counts_.resize(problem.C);
    problem.count = wide_counts_.data();
  }

  ffi::Error compute(Operation operation, ffi::ThreadPool pool) {
    const auto schedule = [](void* pool, void (*task)(void*), void* data) {
      static_cast<ffi::ThreadPool*>(pool)->Schedule([task, data] { task(data); });
    };
    const Helpers helpers{schedule, &pool};
    problem.helpers = &helpers;
    problem.has_new_results = true;
    const int threads = static_cast<int>(std::min<int64_t>(num_threads(), pool.num_threads()));
    if (!is_valid_) return ffi::Error::InvalidArgument("batchnorm: operands that do not go together");
    try {
      for (int64_t lane = 0; lane < count; ++lane) {
        int32_t* const counts = counts_ ? counts_ + lane * problem.C : nullptr;
        if (counts && operation == Operation::backward) std::copy(counts, counts + problem.C, wide_counts_.begin());
        problem.threads = threads;  // `compute` lowers it to what the size is worth
        if (!batchnorm::compute(operation, problem)) return ffi::Error::Internal("batchnorm: no kernel walks such strides");
        if (counts && operation == Operation::forward)
          std::transform(wide_counts_.begin(), wide_counts_.end(), counts, [](int64_t n) { return static_cast<int32_t>(n); });
        for (const auto& [data, bytes] : strides_) *data = static_cast<char*>(*data) + bytes;
      }
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "batchnorm: out of memory");
    }
    return ffi::Error::Success();
  }

 private:
  int64_t size() const { return problem.N * problem.C * problem.S; }
  void check(bool holds) { is_valid_ = is_valid_ && holds; }

  struct Stride { void** data; int64_t bytes; };  // from one lane to the next
  std::vector<Stride> strides_;
  std::vector<int64_t> wide_counts_;
  int32_t* counts_ = nullptr;
  bool is_valid_, is_double_ = false;
};

ffi::Error forward(Buffer x, Buffer gamma, Buffer beta, Buffer residual, Buffer keep, Result y, Result mean, Result mean_lo,
                   Result m2, Result rstd, Result count, double eps, int64_t activation, double slope,
                   bool normalized_padding, ffi::ThreadPool pool) {
  Lanes lanes(x);
  if (lanes.is_valid()) {
    Problem& problem = lanes.problem;
    lanes.large(x, problem.x), lanes.large(residual, problem.residual), lanes.large(*y, problem.y);
    lanes.mask(keep), lanes.parameter(gamma, problem.gamma), lanes.parameter(beta, problem.beta);
    lanes.statistic(*mean, problem.mean), lanes.statistic(*mean_lo, problem.mean_lo);
    lanes.statistic(*m2, problem.m2), lanes.statistic(*rstd, problem.rstd), lanes.counts(*count);
    problem.eps = eps, problem.slope = slope, problem.normalized_padding = normalized_padding;
    problem.activation = static_cast<Activation>(activation);
  }
  return lanes.compute(Operation::forward, pool);
}

ffi::Error backward(Buffer dy, Buffer x, Buffer gamma, Buffer beta, Buffer residual, Buffer keep, Buffer count, Buffer mean,
                    Buffer mean_lo, Buffer rstd, Result dx, Result dgamma, Result dbeta, Result dresidual,
                    int64_t activation, double slope, ffi::ThreadPool pool) {
  Lanes lanes(x);
  if (lanes.is_valid()) {
    Problem& problem = lanes.problem;
    lanes.large(x, problem.x), lanes.large(dy, problem.dy), lanes.large(residual, problem.residual);
    lanes.large(*dx, problem.dx), lanes.large(*dresidual, problem.dresidual), lanes.mask(keep);
    lanes.parameter(gamma, problem.gamma), lanes.parameter(beta, problem.beta);
    lanes.parameter(*dgamma, problem.dgamma), lanes.parameter(*dbeta, problem.dbeta);
    lanes.statistic(mean, problem.mean), lanes.statistic(mean_lo, problem.mean_lo), lanes.statistic(rstd, problem.rstd);
    lanes.counts(count);
    problem.measure = false, problem.slope = slope, problem.activation = static_cast<Activation>(activation);
  }
  return lanes.compute(Operation::backward, pool);
}

}  // namespace

std::pair<int, int> xla_version() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_forward, forward,
                              ffi::Ffi::Bind()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<double>("eps").Attr<int64_t>("activation").Attr<double>("slope")
                                  .Attr<bool>("normalized_padding").Ctx<ffi::ThreadPool>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(xla_backward, backward,
                              ffi::Ffi::Bind()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<int64_t>("activation").Attr<double>("slope").Ctx<ffi::ThreadPool>());

}  // namespace batchnorm
