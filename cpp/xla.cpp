// The kernels as targets of XLA's foreign function interface on the CPU. Arrays are only viewed here; nothing is
// computed.
//
// Arrays are dense and row-major. Those of the shape of x are (L, N, C, S) or (L, N, C), with L lanes, which are
// independent batch norms; those with a number for each channel are (L, C), and the scalars of a state (L, 1). An
// absent operand has one dimension. Operands are those of the primitives in kernels/jax/primitives.py and running.py,
// so checks cover only what would cause reads or writes out of bounds.
#include "xla.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "dispatch.hpp"
#include "running.hpp"
#include "xla_call.hpp"

namespace batchnorm {
namespace {

using xla::Buffer, xla::CheckedCall, xla::DataType, xla::ErrorCode, xla::Failure, xla::refuse, xla::ThreadPool;

// ---- the problem of a call ----------------------------------------------------------------------------------------

bool is_present(const Buffer& buffer) { return buffer.rank > 1; }

int64_t elements_of(const Buffer& buffer) {
  int64_t elements = 1;
  for (int64_t i = 0; i < buffer.rank; ++i) elements *= buffer.dims[i];
  return elements;
}

void check(bool is_consistent) {
  if (!is_consistent) refuse("operands that do not go together");
}

Dtype dtype_of(const Buffer& buffer) {
  switch (buffer.dtype) {
    case DataType::f32: return Dtype::float32;
    case DataType::f64: return Dtype::float64;
    case DataType::f16: return Dtype::float16;
    case DataType::bf16: return Dtype::bfloat16;
    default: refuse("an operand is not of float64, float32, float16 or bfloat16");
  }
}

Activation activation_of(const CheckedCall& call) {
  const int64_t number = call.int64("activation");
  check(number >= 0 && number <= static_cast<int64_t>(Activation::hardswish));
  return static_cast<Activation>(number);
}

// The problems of all lanes, which are computed one after the other.
class LaneProblems {
 public:
  explicit LaneProblems(const Buffer& x) {
    check(x.rank == 3 || x.rank == 4);
    problem.dtype = dtype_of(x);
    lanes_ = x.dims[0];
    // With channels last, rows are along S, as in views of NumPy arrays, because the kernels traverse them in runs.
    is_channels_last_ = x.rank == 3;
    problem.N = is_channels_last_ ? 1 : x.dims[1], problem.C = x.dims[2],
    problem.S = is_channels_last_ ? x.dims[1] : x.dims[3];
    is_float64_ = problem.dtype == Dtype::float64;
  }

  Problem problem = {};

  void add_tensor(const Buffer& buffer, Tensor& tensor) {
    if (!is_present(buffer)) return;
    check(dtype_of(buffer) == problem.dtype && elements_of(buffer) == lanes_ * size());
    tensor = view(buffer, problem.C);
    lane_steps_.push_back({&tensor.data, size() * size_of(problem.dtype)});
  }

  // A mask broadcasts over the channels or has one byte for each element; or it has the lengths of each n, as int32.
  void add_mask(const Buffer& buffer) {
    if (!is_present(buffer)) return;
    if (buffer.rank == 2) {
      check(buffer.dtype == DataType::s32 && !is_channels_last_ && buffer.dims[0] == lanes_ &&
            buffer.dims[1] == problem.N);
      lengths32_ = static_cast<const int32_t*>(buffer.data);
      lengths64_.resize(problem.N);
      problem.mask.lengths = lengths64_.data();
      return;
    }
    check(buffer.dtype == DataType::pred && buffer.rank >= 3 && buffer.dims[0] == lanes_);
    check(buffer.dims[1] == (is_channels_last_ ? problem.S : problem.N));
    const int64_t channels = buffer.dims[2];
    check(channels == 1 || channels == problem.C);
    check(elements_of(buffer) == lanes_ * problem.N * channels * problem.S);
    Tensor& mask = problem.mask.bytes;
    mask = view(buffer, channels);
    if (channels == 1) mask.c = 0;
    lane_steps_.push_back({&mask.data, channels * problem.N * problem.S});
  }

  void add_parameter(const Buffer& buffer, PerChannel& channels) {
    if (!is_present(buffer)) return;
    channels = {buffer.data, dtype_of(buffer), 1};
    check(elements_of(buffer) == lanes_ * problem.C);
    lane_steps_.push_back({&channels.data, problem.C * size_of(channels.dtype)});
  }

  void add_statistic(const Buffer& buffer, void*& table) {
    check(buffer.dtype == (is_float64_ ? DataType::f64 : DataType::f32) && elements_of(buffer) == lanes_ * problem.C);
    table = buffer.data;
    lane_steps_.push_back({&table, problem.C * (is_float64_ ? 8 : 4)});
  }

  // Counts are int32 in XLA and int64 in the kernels.
  void add_counts(const Buffer& buffer) {
    if (!is_present(buffer)) return;
    check(buffer.dtype == DataType::s32 && elements_of(buffer) == lanes_ * problem.C);
    counts32_ = static_cast<int32_t*>(buffer.data);
    counts64_.resize(problem.C);
    problem.count = counts64_.data();
  }

  void compute(Operation operation, ThreadPool xla_pool) {
    const auto schedule = [](void* to, void (*task)(void*), void* data) {
      static_cast<ThreadPool*>(to)->schedule(task, data);
    };
    const ExternalPool pool{schedule, &xla_pool};
    problem.pool = &pool;
    problem.has_uncached_results = true;
    const int threads = static_cast<int>(std::min<int64_t>(num_threads(), xla_pool.size()));
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      int32_t* const counts = counts32_ ? counts32_ + lane * problem.C : nullptr;
      if (counts && operation == Operation::backward) std::copy(counts, counts + problem.C, counts64_.begin());
      if (lengths32_)  // lengths are not checked while they are traced
        std::transform(lengths32_ + lane * problem.N, lengths32_ + (lane + 1) * problem.N, lengths64_.begin(),
                       [S = problem.S](int64_t length) { return std::clamp<int64_t>(length, 0, S); });
      problem.threads = threads;  // `compute` lowers it for small problems
      if (!batchnorm::compute(operation, problem)) refuse("no kernel walks such strides");
      if (counts && operation == Operation::forward)
        std::transform(counts64_.begin(), counts64_.end(), counts, [](int64_t n) { return static_cast<int32_t>(n); });
      for (const auto& [data, bytes] : lane_steps_) *data = static_cast<char*>(*data) + bytes;
    }
  }

 private:
  Tensor view(const Buffer& buffer, int64_t channels) const {
    if (is_channels_last_) return {buffer.data, channels * problem.S, 1, channels};
    return {buffer.data, channels * problem.S, problem.S, 1};
  }
  int64_t size() const { return problem.N * problem.C * problem.S; }

  struct LaneStep {  // from one lane to the next
    void** data;
    int64_t bytes;
  };
  std::vector<LaneStep> lane_steps_;
  std::vector<int64_t> counts64_, lengths64_;
  const int32_t* lengths32_ = nullptr;
  int32_t* counts32_ = nullptr;
  int64_t lanes_ = 0;
  bool is_float64_ = false, is_channels_last_ = false;
};

// ---- the targets --------------------------------------------------------------------------------------------------

void forward(const xla::CallFrame& frame) {
  enum { x, gamma, beta, residual, mask, args };
  enum { y, mean, mean_lo, m2, rstd, count, rets };
  const CheckedCall call(frame, args, rets, 4);
  LaneProblems lanes(call.arg(x));
  Problem& problem = lanes.problem;
  lanes.add_tensor(call.arg(x), problem.x), lanes.add_tensor(call.arg(residual), problem.residual),
      lanes.add_tensor(call.ret(y), problem.forward.y);
  lanes.add_mask(call.arg(mask)), lanes.add_parameter(call.arg(gamma), problem.gamma),
      lanes.add_parameter(call.arg(beta), problem.beta);
  lanes.add_statistic(call.ret(mean), problem.mean), lanes.add_statistic(call.ret(mean_lo), problem.mean_lo);
  lanes.add_statistic(call.ret(m2), problem.forward.m2), lanes.add_statistic(call.ret(rstd), problem.rstd),
      lanes.add_counts(call.ret(count));
  problem.forward.eps = call.float64("eps"), problem.slope = call.float64("slope");
  problem.normalized_padding = call.boolean("normalized_padding");
  problem.activation = activation_of(call);
  lanes.compute(Operation::forward, ThreadPool(frame));
}

void backward(const xla::CallFrame& frame) {
  enum { dy, x, gamma, beta, residual, mask, count, mean, mean_lo, rstd, args };
  enum { dx, dgamma, dbeta, dresidual, rets };
  const CheckedCall call(frame, args, rets, 3);
  LaneProblems lanes(call.arg(x));
  Problem& problem = lanes.problem;
  lanes.add_tensor(call.arg(x), problem.x), lanes.add_tensor(call.arg(dy), problem.backward.dy),
      lanes.add_tensor(call.arg(residual), problem.residual);
  lanes.add_tensor(call.ret(dx), problem.backward.dx),
      lanes.add_tensor(call.ret(dresidual), problem.backward.dresidual), lanes.add_mask(call.arg(mask));
  lanes.add_parameter(call.arg(gamma), problem.gamma), lanes.add_parameter(call.arg(beta), problem.beta);
  lanes.add_parameter(call.ret(dgamma), problem.backward.dgamma),
      lanes.add_parameter(call.ret(dbeta), problem.backward.dbeta);
  lanes.add_statistic(call.arg(mean), problem.mean), lanes.add_statistic(call.arg(mean_lo), problem.mean_lo);
  lanes.add_statistic(call.arg(rstd), problem.rstd), lanes.add_counts(call.arg(count));
  problem.slope = call.float64("slope");
  problem.normalized_padding = call.boolean("normalized_padding");
  problem.activation = activation_of(call);
  lanes.compute(Operation::backward, ThreadPool(frame));
}

// Copies the running statistics of each lane, and updates the copies by its batch.
void advance(const xla::CallFrame& frame) {
  enum { mean, spread, steps, weight, skipped, fields };
  enum { count = fields, batch_mean, batch_mean_lo, batch_m2, args };
  const CheckedCall call(frame, args, fields, 9);
  const Buffer& shape = call.ret(mean);
  check(shape.rank == 2);
  const int64_t lanes = shape.dims[0], C = shape.dims[1];
  // The part of one lane in an array with `length` numbers for each lane.
  const auto lane_part = [&](const Buffer& buffer, int64_t lane, int64_t length) {
    const Dtype dtype = dtype_of(buffer);
    check(size_of(dtype) >= 4 && elements_of(buffer) == lanes * length);
    return PerChannel{static_cast<char*>(buffer.data) + lane * length * size_of(dtype), dtype, 1};
  };
  const auto checked_number = [&](int64_t number, int64_t upper) {
    check(number >= 0 && number <= upper);
    return number;
  };
  Averaging averaging;
  averaging.tracked =
      static_cast<Tracked>(checked_number(call.int64("tracked"), static_cast<int64_t>(Tracked::log10_std)));
  averaging.debias =
      static_cast<Debias>(checked_number(call.int64("debias"), static_cast<int64_t>(Debias::first_batch)));
  averaging.correction = static_cast<int>(checked_number(call.int64("correction"), 1));
  averaging.corrects_tracked = call.boolean("corrects_tracked"), averaging.is_clamped = call.boolean("is_clamped");
  averaging.needs_two = call.boolean("needs_two"), averaging.is_cumulative = call.boolean("is_cumulative");
  averaging.momentum = call.float64("momentum"), averaging.eps = call.float64("eps");

  check(call.arg(count).dtype == DataType::s32 && elements_of(call.arg(count)) == lanes * C);
  std::vector<int64_t> counts(C);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    PerChannel state[fields];
    for (int64_t i = 0; i < fields; ++i) {
      const int64_t length = i <= spread ? C : 1;
      const PerChannel before = lane_part(call.arg(i), lane, length);
      state[i] = lane_part(call.ret(i), lane, length);
      check(before.dtype == state[i].dtype);
      std::memcpy(state[i].data, before.data, length * size_of(before.dtype));
    }
    const auto* const counts32 = static_cast<const int32_t*>(call.arg(count).data) + lane * C;
    std::copy(counts32, counts32 + C, counts.begin());
    RunningStatistics running{state[mean], state[spread], value_at(state[steps], 0), value_at(state[weight], 0)};
    const auto moment = [&](int64_t i) { return lane_part(call.arg(i), lane, C); };
    const BatchMoments batch{moment(batch_mean), moment(batch_mean_lo), moment(batch_m2), counts.data()};
    const UpdateOutcome outcome = batchnorm::advance(running, running, batch, averaging, C);
    set_value(state[steps], 0, running.steps), set_value(state[weight], 0, running.weight);
    if (outcome == UpdateOutcome::refused) set_value(state[skipped], 0, value_at(state[skipped], 0) + 1);
  }
}

// XLA asks each target for the version that it is compiled for, and registers only targets of versions that it
// supports.
bool answer_metadata(const xla::CallFrame& frame) {
  if (!frame.extensions || frame.extensions->type != xla::ExtensionType::metadata) return false;
  xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(frame.extensions)->metadata;
  if (metadata.struct_size < offsetof(xla::Metadata, traits) + sizeof metadata.traits)
    refuse("XLA's metadata are too small");
  metadata.version = {sizeof metadata.version, nullptr, xla::major_version, xla::minor_version};
  metadata.traits = 0;
  metadata.state_type = 0;  // not counted in the size, but part of the struct since version 0.1
  return true;
}

template <void (*target)(const xla::CallFrame&)> xla::Error* run(const xla::CallFrame& frame) {
  try {
    if (!answer_metadata(frame)) target(frame);
    return nullptr;
  } catch (const Failure& failure) {
    return xla::error_of(*frame.api, failure.code, failure.message.c_str());
  } catch (const std::bad_alloc&) {
    return xla::error_of(*frame.api, ErrorCode::resource_exhausted, "batchnorm: out of memory");
  } catch (const std::exception& error) {
    return xla::error_of(*frame.api, ErrorCode::internal, error.what());
  }
}

}  // namespace

extern "C" xla::Error* xla_forward(xla::CallFrame* frame) { return run<forward>(*frame); }
extern "C" xla::Error* xla_backward(xla::CallFrame* frame) { return run<backward>(*frame); }
extern "C" xla::Error* xla_advance(xla::CallFrame* frame) { return run<advance>(*frame); }

}  // namespace batchnorm
