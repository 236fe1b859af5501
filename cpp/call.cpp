#include "call.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "parameters.hpp"
#include "state.hpp"
#include "statistics.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

// Memory for numbers of the channels that are in no result.
class Scratch {
 public:
  template <class T> T* allocate(int64_t length) {
    buffers_.emplace_back(new char[length * sizeof(T)]);
    return reinterpret_cast<T*>(buffers_.back().get());
  }

 private:
  std::vector<std::unique_ptr<char[]>> buffers_;
};

// ---- forward --------------------------------------------------------------------------------------------------------

// One call of `normalize`.
class Normalization {
 public:
  Normalization(const Library& library, const Request& request, const Spec& spec, handle operands, int threads)
      : library_(library), request_(request), spec_(spec),
        is_by_batch_(request.source == Source::batch && !spec.normalizes_by_running), threads_(threads),
        operands_(library, operands, spec), parameters_(spec, operands_),
        groups_(spec, operands_, is_by_batch_ || spec.has_lanes()),
        C_(operands_.size_along(spec.channel_axes, true, spec.has_lanes() ? 1 : 0)),
        total_channels_(groups_.number() * C_), statistics_element_(statistics_element(operands_.x.dtype())) {}

  nb::object run(handle numbers, handle out) {
    if (request_.source == Source::given) return normalize_by_given(numbers, out);
    if (!numbers.is_none()) state_.reset(new RunningState(library_, numbers, request_.is_in_place, spec_, operands_));
    const bool is_training = request_.source == Source::batch;
    if (is_training) check_trainable();
    if (!is_by_batch_ && !state_) decline(Refusal::state);
    StatisticRows batch_rows;
    nb::object y = nb::none(), statistics = nb::none(), count = nb::none(), copies = nb::none(), outcome = nb::none();
    if (is_training || (spec_.always_updates && state_)) {
      if (is_by_batch_) statistics = allocate(batch_rows, count);
      allocate_scratch(batch_rows);
      if (is_by_batch_ && request_.has_output()) y = output(out);
      if (is_training && !out.is_none() && has_single_rule() &&
          operands_.is_masked()) {  // declines before `out` is written
        compute(batch_rows, nb::none(), true);
        check_single(batch_rows);
      }
      compute(batch_rows, y, true);
      if (is_training) check_single(batch_rows);
      if (state_) outcome = nb::cast(static_cast<int>(advance(batch_rows, copies)));
    }
    if (!is_by_batch_) {
      StatisticRows running_rows;
      statistics = allocate(running_rows, count);
      const Dtype dtype = statistics_element_ == Element::float64 ? Dtype::float64 : Dtype::float32;
      const auto row = [&](Statistic i) { return PerChannel{row_or_scratch(running_rows, i), dtype, 1}; };
      fill_statistics(state_->current(), spec_.averaging, spec_.eps_eval,
                      {row(mean_row), row(mean_lo_row), row(rstd_row)}, total_channels_);
      if (request_.has_output()) {
        y = output(out);
        compute(running_rows, y, false);
      }
    }
    return nb::make_tuple(y, outcome, copies, statistics, count);
  }

 private:
  nb::object normalize_by_given(handle numbers, handle out) {
    const GivenStatistics given(library_, numbers, operands_.x.dtype(), total_channels_);
    nb::object y = output(out);
    compute(given.rows, y, false);
    return nb::make_tuple(y, nb::none(), nb::none(), nb::none(), nb::none());
  }

  // ---- results ----

  nb::object output(handle out) {
    const Operands& operands = operands_;
    if (out.is_none()) return library_.empty_like(operands.item(0), operands.x);
    const Array y(library_.require_own(out), true);
    check_like(y, operands.x);
    check_output(y);
    for (const Array* input : {&operands.x, &operands.residual}) check_overlap(y, *input, true);
    for (const Array* parameter : {&operands.gamma, &operands.beta}) check_overlap(y, *parameter, false);
    return nb::borrow(out);
  }

  // Allocates the returned statistics, of all groups, and the counts.
  nb::object allocate(StatisticRows& rows, nb::object& count) {
    const handle x = operands_.item(0);
    if (request_.returns == Returns::output) return nb::none();
    const bool has_count = !request_.returns_table() || operands_.is_masked();
    int64_t shape[max_dimensions];
    int ndim = 0;
    if (spec_.group_size && !spec_.has_lanes() && is_by_batch_) shape[ndim++] = groups_.number();
    for (int axis = 0; axis < operands_.x.ndim; ++axis)
      if (spec_.channel_axes >> axis & 1) shape[ndim++] = operands_.x.shape[axis];
    const auto row = [&](Statistic i) {
      nb::object array = library_.empty(x, statistics_element_, ndim, shape);
      rows.data[i] = Array(array, true).data;
      return array;
    };
    if (is_by_batch_ && has_count) {
      if (request_.returns_table()) shape[0] = total_channels_, ndim = 1;
      count = library_.empty(x, Element::int64, ndim, shape);
      rows.count = static_cast<int64_t*>(Array(count, true).data);
    }
    if (!request_.returns_table()) {
      nb::object mean = row(mean_row), mean_lo = row(mean_lo_row);
      if (request_.returns == Returns::moments) return nb::make_tuple(mean, mean_lo, row(m2_row));
      nb::object rstd = row(rstd_row);
      return request_.returns_m2() ? nb::make_tuple(mean, mean_lo, rstd, row(m2_row))
                                   : nb::make_tuple(mean, mean_lo, rstd);
    }
    const bool has_xhat_scale = is_by_batch_ && spec_.has_xhat_scale();
    const int64_t sizes[] = {has_xhat_scale ? 4 : 3, total_channels_};
    nb::object table = library_.empty(x, statistics_element_, 2, sizes);
    char* const begin = static_cast<char*>(Array(table, true).data);
    const int64_t bytes = total_channels_ * (statistics_element_ == Element::float64 ? 8 : 4);
    for (Statistic i : {mean_row, mean_lo_row, rstd_row}) rows.data[i] = begin + i * bytes;
    if (has_xhat_scale) rows.data[xhat_scale_row] = begin + 3 * bytes;
    return table;
  }

  // Allocates the other rows that the running update and the check of single elements need.
  void allocate_scratch(StatisticRows& rows) {
    if (state_)
      for (Statistic i : {mean_row, mean_lo_row, m2_row}) row_or_scratch(rows, i);
    const bool has_counts = operands_.is_masked() || groups_.number() > 1;
    if (has_counts && !rows.count && (state_ || has_single_rule()))
      rows.count = scratch_.allocate<int64_t>(total_channels_);
  }

  // A row; in scratch memory if it is in no result.
  void* row_or_scratch(StatisticRows& rows, Statistic i) {
    if (!rows.data[i]) rows.data[i] = scratch_.allocate<double>(total_channels_);
    return rows.data[i];
  }

  // ---- the passes ----

  // Computes each group; with None for y, only the moments.
  void compute(const StatisticRows& rows, const nb::object& y_object, bool computes_moments) {
    Operands& operands = full_operands();
    Array y(y_object, true);
    for (int64_t group = 0; group < groups_.number(); ++group) {
      groups_.narrow(group, {&operands.x, &operands.residual, &operands.mask, &y});
      if (!spec_.has_lanes()) groups_.narrow(group, {&operands.lengths});
      Views views;
      Problem& problem = views.problem;
      views.add(operands.x, problem.x);
      views.add(operands.residual, problem.residual);
      views.add(y, problem.forward.y);
      views.finish(operands.x, spec_.channel_axes, operands.mask, operands.lengths);
      problem.threads = threads_ > 0 ? threads_ : num_threads();
      parameters_.bind(problem, group);
      rows.bind(problem, group);
      problem.forward.computes_moments = computes_moments;
      problem.forward.eps = spec_.eps, problem.forward.eps_placement = spec_.eps_train,
      problem.forward.correction = spec_.correction;
      compute_without_gil(Operation::forward, problem);
    }
  }

  // The operands with all groups; `compute` narrows them to one group after the other.
  Operands& full_operands() {
    if (groups_.number() == 1) return operands_;
    full_operands_.reset(new Operands(library_, operands_.objects, spec_));
    return *full_operands_;
  }

  // ---- single elements ----

  bool has_single_rule() const {
    if (spec_.single == Single::error && operands_.is_masked()) return spec_.refuses_masked_single;
    return spec_.single != Single::clamp;
  }

  void check_trainable() const {
    if (!(spec_.eps <= 1e300) || (spec_.eps == 0 && spec_.refuses_zero_eps)) decline(Refusal::eps);
    if (operands_.is_masked() || !has_single_rule()) return;
    const int64_t inner = operands_.size_along(spec_.channel_axes, false, 1);
    for (int64_t group = 0; group < groups_.number(); ++group) {
      const int64_t along_first = spec_.channel_axes & 1 ? 1 : groups_.length(group);
      if (along_first * inner == 1) decline(Refusal::single);
    }
  }

  // Declines if the mask leaves a channel one valid element, or, unless the rule is `error`, none.
  void check_single(const StatisticRows& rows) const {
    if (!operands_.is_masked() || !has_single_rule()) return;
    const int64_t least = spec_.single == Single::error ? 1 : 0;
    for (int64_t c = 0; c < total_channels_; ++c)
      if (rows.count[c] >= least && rows.count[c] <= 1) decline(Refusal::single);
  }

  // ---- the running update ----

  UpdateOutcome advance(const StatisticRows& rows, nb::object& copies) {
    const Averaging& averaging = operands_.is_masked() ? spec_.masked_averaging : spec_.averaging;
    if (spec_.has_lanes() || groups_.number() == 1) return state_->advance(batch_moments(rows, 0), averaging, copies);
    MergedMoments merged{scratch_.allocate<double>(C_), scratch_.allocate<double>(C_), scratch_.allocate<int64_t>(C_)};
    std::fill_n(merged.mean, C_, 0), std::fill_n(merged.m2, C_, 0), std::fill_n(merged.count, C_, 0);
    for (int64_t group = 0; group < groups_.number(); ++group) merged.merge(batch_moments(rows, group), C_);
    double* const zeros = scratch_.allocate<double>(C_);
    std::fill_n(zeros, C_, 0);
    const auto doubles = [](double* values) { return PerChannel{values, Dtype::float64, 1}; };
    return state_->advance({doubles(merged.mean), doubles(zeros), doubles(merged.m2), merged.count}, averaging, copies);
  }

  BatchMoments batch_moments(const StatisticRows& rows, int64_t group) const {
    const Dtype dtype = statistics_element_ == Element::float64 ? Dtype::float64 : Dtype::float32;
    const auto row = [&](Statistic i) { return group_slice({rows.data[i], dtype, 1}, group, C_); };
    BatchMoments batch{row(mean_row), row(mean_lo_row), row(m2_row)};
    if (rows.count) batch.count = rows.count + group * C_;
    else batch.shared_count = operands_.size_along(spec_.channel_axes, false, 0);
    return batch;
  }

  const Library& library_;
  const Request& request_;
  const Spec& spec_;
  bool is_by_batch_;  // normalizes by the statistics of the batch
  int threads_;
  Operands operands_;
  Parameters parameters_;
  Groups groups_;
  int64_t C_, total_channels_;  // channels of a group, and of all groups
  Element statistics_element_;
  Scratch scratch_;
  std::unique_ptr<RunningState> state_;
  std::unique_ptr<Operands> full_operands_;
};

// ---- backward -------------------------------------------------------------------------------------------------------

nb::object gradients_of(const Library& library, const Spec& spec, handle dy_object, handle operand_tuple,
                        handle statistics, handle count_object, bool through_statistics, bool has_dx, int threads) {
  Operands operands(library, operand_tuple, spec);
  Array dy(library.require_own(dy_object)), count(library.require_own(count_object));
  if (!dy) decline(Refusal::shape);
  check_like(dy, operands.x);
  const Groups groups(spec, operands, through_statistics || spec.has_lanes());
  const int64_t total_channels = operands.size_along(spec.channel_axes, true, 0);
  const int64_t C = operands.size_along(spec.channel_axes, true, spec.has_lanes() ? 1 : 0);
  const GivenStatistics given(library, statistics, operands.x.dtype(), groups.number() * C);
  StatisticRows rows = given.rows;
  if (through_statistics && spec.has_xhat_scale() && !rows.data[xhat_scale_row]) decline(Refusal::shape);
  if (count) {
    if (count.element != Element::int64 || !count.is_contiguous() || count.size() != groups.number() * C)
      decline(Refusal::shape);
    rows.count = static_cast<int64_t*>(count.data);
  }
  const auto empty_like = [&](int i, const Array& array, bool is_wanted) {
    return array && is_wanted ? library.empty_like(operands.item(i), array) : nb::none();
  };
  nb::object dx_object = empty_like(0, operands.x, has_dx), dgamma_object = empty_like(1, operands.gamma, true);
  nb::object dbeta_object = empty_like(2, operands.beta, true),
             dresidual_object = empty_like(3, operands.residual, true);
  Array dx(dx_object, true), dgamma(dgamma_object, true), dbeta(dbeta_object, true), dresidual(dresidual_object, true);
  const Parameters parameters(spec, operands);
  const bool is_summed = !spec.has_lanes() && groups.number() > 1;
  ParameterGradient gamma_gradient(dgamma, total_channels, is_summed || spec.affine != Affine::plain);
  ParameterGradient beta_gradient(dbeta, total_channels, is_summed || spec.affine == Affine::ignored);
  for (int64_t group = 0; group < groups.number(); ++group) {
    groups.narrow(group, {&operands.x, &operands.residual, &operands.mask, &dy, &dx, &dresidual});
    if (!spec.has_lanes()) groups.narrow(group, {&operands.lengths});
    Views views;
    Problem& problem = views.problem;
    views.add(operands.x, problem.x);
    views.add(dy, problem.backward.dy);
    views.add(operands.residual, problem.residual);
    views.add(dx, problem.backward.dx);
    views.add(dresidual, problem.backward.dresidual);
    views.finish(operands.x, spec.channel_axes, operands.mask, operands.lengths);
    problem.threads = threads > 0 ? threads : num_threads();
    parameters.bind(problem, group);
    rows.bind(problem, group);
    if (parameters.has_gamma())
      problem.backward.dgamma = parameters.of_group(gamma_gradient.destination(), group, problem.C);
    if (parameters.has_beta())
      problem.backward.dbeta = parameters.of_group(beta_gradient.destination(), group, problem.C);
    problem.backward.through_statistics = through_statistics;
    compute_without_gil(Operation::backward, problem);
    if (is_summed) gamma_gradient.add_group(), beta_gradient.add_group();
  }
  if (!is_summed) gamma_gradient.add_group(), beta_gradient.add_group();
  gamma_gradient.finish(
      [&](int64_t c) { return parameters.has_gamma() ? parameters.effective_gamma_derivative(c) : 0; });
  beta_gradient.finish([](int64_t) { return 1; });
  return nb::make_tuple(dx_object, dgamma_object, dbeta_object, dresidual_object);
}

template <class Compute> nb::object or_refusal(const Compute& compute) {
  try {
    return compute();
  } catch (const Declined& declined) {
    return nb::cast(declined.reason);
  }
}

}  // namespace

nb::object normalize(const Library& library, const Request& request, const Spec& spec, handle operands, handle numbers,
                     handle out, int threads) {
  return or_refusal([&] { return Normalization(library, request, spec, operands, threads).run(numbers, out); });
}

nb::object gradients(const Library& library, const Spec& spec, handle dy, handle operands, handle statistics,
                     handle count, bool through_statistics, bool has_dx, int threads) {
  return or_refusal([&] {
    return gradients_of(library, spec, dy, operands, statistics, count, through_statistics, has_dx, threads);
  });
}

}  // namespace batchnorm
