#include "call.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "numbers.hpp"
#include "parameters.hpp"
#include "state.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

// Memory for the numbers of the channels that no result holds.
class Scratch {
 public:
  template <class T> T* take(int64_t length) {
    blocks_.emplace_back(new char[length * sizeof(T)]);
    return reinterpret_cast<T*>(blocks_.back().get());
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
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
        C_(operands_.size_along(spec.channel_axes, true, spec.has_lanes() ? 1 : 0)), all_(groups_.number() * C_),
        wide_(element_of(operands_.x.dtype())) {}

  nb::object run(handle numbers, handle out) {
    if (request_.source == Source::given) return by_given(numbers, out);
    if (!numbers.is_none()) state_.reset(new State(library_, numbers, request_.is_in_place, spec_, operands_));
    const bool is_training = request_.source == Source::batch;
    if (is_training) check_trainable();
    if (!is_by_batch_ && !state_) decline(Refusal::state);
    Numbers measured;
    nb::object y = nb::none(), statistics = nb::none(), count = nb::none(), copies = nb::none(), entry = nb::none();
    if (is_training || (spec_.always_updates && state_)) {
      if (is_by_batch_) statistics = allocate(measured, count);
      allocate_rest(measured);
      if (is_by_batch_ && request_.has_output()) y = output(out);
      if (is_training && !out.is_none() && has_single_rule() && operands_.is_masked()) {  // before `out` is written
        compute(measured, nb::none(), true);
        check_single(measured);
      }
      compute(measured, y, true);
      if (is_training) check_single(measured);
      if (state_) entry = nb::cast(static_cast<int>(advance(measured, copies)));
    }
    if (!is_by_batch_) {
      Numbers normalizing;
      statistics = allocate(normalizing, count);
      const Dtype dtype = wide_ == Element::float64 ? Dtype::float64 : Dtype::float32;
      const auto row = [&](Row i) { return Channels{at(normalizing, i), dtype, 1}; };
      statistics_of(state_->current(), spec_.averaging, spec_.eps_eval,
                    {row(mean_row), row(mean_lo_row), row(rstd_row)}, all_);
      if (request_.has_output()) {
        y = output(out);
        compute(normalizing, y, false);
      }
    }
    return nb::make_tuple(y, entry, copies, statistics, count);
  }

 private:
  nb::object by_given(handle numbers, handle out) {
    const GivenStatistics given(library_, numbers, operands_.x.dtype(), all_);
    nb::object y = output(out);
    compute(given.numbers, y, false);
    return nb::make_tuple(y, nb::none(), nb::none(), nb::none(), nb::none());
  }

  // ---- results ----

  nb::object output(handle out) {
    const Operands& a = operands_;
    if (out.is_none()) return library_.like(a.item(0), a.x);
    const Array y(library_.own(out), true);
    check_like(y, a.x);
    check_output(y);
    for (const Array* input : {&a.x, &a.residual}) check_overlap(y, *input, true);
    for (const Array* parameter : {&a.gamma, &a.beta}) check_overlap(y, *parameter, false);
    return nb::borrow(out);
  }

  // The statistics that are returned, of all groups, and the counts.
  nb::object allocate(Numbers& numbers, nb::object& count) {
    const handle x = operands_.item(0);
    if (request_.returns == Returns::output) return nb::none();
    const bool has_count = !request_.returns_table() || operands_.is_masked();
    int64_t shape[most_dimensions];
    int ndim = 0;
    if (spec_.group_size && !spec_.has_lanes() && is_by_batch_) shape[ndim++] = groups_.number();
    for (int axis = 0; axis < operands_.x.ndim; ++axis)
      if (spec_.channel_axes >> axis & 1) shape[ndim++] = operands_.x.shape[axis];
    const auto row = [&](Row i) {
      nb::object made = library_.empty(x, wide_, ndim, shape);
      numbers.at[i] = Array(made, true).data;
      return made;
    };
    if (is_by_batch_ && has_count) {
      if (request_.returns_table()) shape[0] = all_, ndim = 1;
      count = library_.empty(x, Element::int64, ndim, shape);
      numbers.count = static_cast<int64_t*>(Array(count, true).data);
    }
    if (!request_.returns_table()) {
      nb::object mean = row(mean_row), mean_lo = row(mean_lo_row);
      if (request_.returns == Returns::moments) return nb::make_tuple(mean, mean_lo, row(m2_row));
      nb::object rstd = row(rstd_row);
      return request_.returns_m2() ? nb::make_tuple(mean, mean_lo, rstd, row(m2_row))
                                   : nb::make_tuple(mean, mean_lo, rstd);
    }
    const bool has_factor = is_by_batch_ && spec_.has_factor();
    const int64_t sizes[] = {has_factor ? 4 : 3, all_};
    nb::object table = library_.empty(x, wide_, 2, sizes);
    char* const begin = static_cast<char*>(Array(table, true).data);
    const int64_t bytes = all_ * (wide_ == Element::float64 ? 8 : 4);
    for (Row i : {mean_row, mean_lo_row, rstd_row}) numbers.at[i] = begin + i * bytes;
    if (has_factor) numbers.at[factor_row] = begin + 3 * bytes;
    return table;
  }

  // What the running update and the check of single elements need besides.
  void allocate_rest(Numbers& numbers) {
    if (state_)
      for (Row i : {mean_row, mean_lo_row, m2_row}) at(numbers, i);
    const bool has_counts = operands_.is_masked() || groups_.number() > 1;
    if (has_counts && !numbers.count && (state_ || has_single_rule())) numbers.count = scratch_.take<int64_t>(all_);
  }

  // A row, in memory of this call where it is in no result.
  void* at(Numbers& numbers, Row i) {
    if (!numbers.at[i]) numbers.at[i] = scratch_.take<double>(all_);
    return numbers.at[i];
  }

  // ---- the passes ----

  // Over each group; y is None where x is only measured.
  void compute(const Numbers& numbers, const nb::object& y_, bool measures) {
    Operands& a = fresh_operands();
    Array y(y_, true);
    for (int64_t group = 0; group < groups_.number(); ++group) {
      groups_.narrow(group, {&a.x, &a.residual, &a.mask, &y});
      if (!spec_.has_lanes()) groups_.narrow(group, {&a.lengths});
      Views views;
      Problem& problem = views.problem;
      views.add(a.x, problem.x);
      views.add(a.residual, problem.residual);
      views.add(y, problem.forward.y);
      views.finish(a.x, spec_.channel_axes, a.mask, a.lengths);
      problem.threads = threads_ > 0 ? threads_ : num_threads();
      parameters_.enter(problem, group);
      numbers.enter(problem, group);
      problem.forward.measure = measures;
      problem.forward.eps = spec_.eps, problem.forward.eps_placement = spec_.eps_train,
      problem.forward.correction = spec_.correction;
      compute_unlocked(Operation::forward, problem);
    }
  }

  // The operands as they were given: groups narrow them.
  Operands& fresh_operands() {
    if (groups_.number() == 1) return operands_;
    narrowed_.reset(new Operands(library_, operands_.objects, spec_));
    return *narrowed_;
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

  // Of a mask, by what it has left.
  void check_single(const Numbers& numbers) const {
    if (!operands_.is_masked() || !has_single_rule()) return;
    const int64_t least = spec_.single == Single::error ? 1 : 0;
    for (int64_t c = 0; c < all_; ++c)
      if (numbers.count[c] >= least && numbers.count[c] <= 1) decline(Refusal::single);
  }

  // ---- the running update ----

  Entry advance(const Numbers& numbers, nb::object& copies) {
    const Averaging& averaging = operands_.is_masked() ? spec_.masked_averaging : spec_.averaging;
    if (spec_.has_lanes() || groups_.number() == 1) return state_->advance(batch_of(numbers, 0), averaging, copies);
    MergedMoments merged{scratch_.take<double>(C_), scratch_.take<double>(C_), scratch_.take<int64_t>(C_)};
    std::fill_n(merged.mean, C_, 0), std::fill_n(merged.m2, C_, 0), std::fill_n(merged.count, C_, 0);
    for (int64_t group = 0; group < groups_.number(); ++group) merged.merge(batch_of(numbers, group), C_);
    double* const none = scratch_.take<double>(C_);
    std::fill_n(none, C_, 0);
    const auto doubles = [](double* values) { return Channels{values, Dtype::float64, 1}; };
    return state_->advance({doubles(merged.mean), doubles(none), doubles(merged.m2), merged.count}, averaging, copies);
  }

  Batch batch_of(const Numbers& numbers, int64_t group) const {
    const Dtype dtype = wide_ == Element::float64 ? Dtype::float64 : Dtype::float32;
    const auto part = [&](Row i) { return part_of({numbers.at[i], dtype, 1}, group, C_); };
    Batch batch{part(mean_row), part(mean_lo_row), part(m2_row)};
    if (numbers.count) batch.count = numbers.count + group * C_;
    else batch.shared_count = operands_.size_along(spec_.channel_axes, false, 0);
    return batch;
  }

  const Library& library_;
  const Request& request_;
  const Spec& spec_;
  bool is_by_batch_;  // normalizes by the batch's own statistics
  int threads_;
  Operands operands_;
  Parameters parameters_;
  Groups groups_;
  int64_t C_, all_;  // channels of a group, and of all groups
  Element wide_;
  Scratch scratch_;
  std::unique_ptr<State> state_;
  std::unique_ptr<Operands> narrowed_;
};

// ---- backward -------------------------------------------------------------------------------------------------------

nb::object gradients_of(const Library& library, const Spec& spec, handle dy_, handle operands, handle statistics,
                        handle count_, bool through_statistics, bool has_dx, int threads) {
  Operands a(library, operands, spec);
  Array dy(library.own(dy_)), count(library.own(count_));
  if (!dy) decline(Refusal::shape);
  check_like(dy, a.x);
  const Groups groups(spec, a, through_statistics || spec.has_lanes());
  const int64_t channels_of_all = a.size_along(spec.channel_axes, true, 0);
  const int64_t C = a.size_along(spec.channel_axes, true, spec.has_lanes() ? 1 : 0);
  const GivenStatistics given(library, statistics, a.x.dtype(), groups.number() * C);
  Numbers numbers = given.numbers;
  if (through_statistics && spec.has_factor() && !numbers.at[factor_row]) decline(Refusal::shape);
  if (count) {
    if (count.element != Element::int64 || !count.is_contiguous() || count.size() != groups.number() * C)
      decline(Refusal::shape);
    numbers.count = static_cast<int64_t*>(count.data);
  }
  const auto like = [&](int i, const Array& array, bool is_wanted) {
    return array && is_wanted ? library.like(a.item(i), array) : nb::none();
  };
  nb::object dx_ = like(0, a.x, has_dx), dgamma_ = like(1, a.gamma, true), dbeta_ = like(2, a.beta, true);
  nb::object dresidual_ = like(3, a.residual, true);
  Array dx(dx_, true), dgamma(dgamma_, true), dbeta(dbeta_, true), dresidual(dresidual_, true);
  const Parameters parameters(spec, a);
  const bool are_summed = !spec.has_lanes() && groups.number() > 1;
  ParameterGradient of_gamma(dgamma, channels_of_all, are_summed || spec.affine != Affine::plain);
  ParameterGradient of_beta(dbeta, channels_of_all, are_summed || spec.affine == Affine::ignored);
  for (int64_t group = 0; group < groups.number(); ++group) {
    groups.narrow(group, {&a.x, &a.residual, &a.mask, &dy, &dx, &dresidual});
    if (!spec.has_lanes()) groups.narrow(group, {&a.lengths});
    Views views;
    Problem& problem = views.problem;
    views.add(a.x, problem.x);
    views.add(dy, problem.backward.dy);
    views.add(a.residual, problem.residual);
    views.add(dx, problem.backward.dx);
    views.add(dresidual, problem.backward.dresidual);
    views.finish(a.x, spec.channel_axes, a.mask, a.lengths);
    problem.threads = threads > 0 ? threads : num_threads();
    parameters.enter(problem, group);
    numbers.enter(problem, group);
    if (parameters.has_gamma()) problem.backward.dgamma = parameters.of_group(of_gamma.part(), group, problem.C);
    if (parameters.has_beta()) problem.backward.dbeta = parameters.of_group(of_beta.part(), group, problem.C);
    problem.backward.through_statistics = through_statistics;
    compute_unlocked(Operation::backward, problem);
    if (are_summed) of_gamma.add(), of_beta.add();
  }
  if (!are_summed) of_gamma.add(), of_beta.add();
  of_gamma.finish([&](int64_t c) { return parameters.has_gamma() ? parameters.derivative_of_gamma(c) : 0; });
  of_beta.finish([](int64_t) { return 1; });
  return nb::make_tuple(dx_, dgamma_, dbeta_, dresidual_);
}

template <class Compute> nb::object answer(const Compute& compute) {
  try {
    return compute();
  } catch (const Declined& declined) {
    return nb::cast(declined.reason);
  }
}

}  // namespace

nb::object normalize(const Library& library, const Request& request, const Spec& spec, handle operands, handle numbers,
                     handle out, int threads) {
  return answer([&] { return Normalization(library, request, spec, operands, threads).run(numbers, out); });
}

nb::object gradients(const Library& library, const Spec& spec, handle dy, handle operands, handle statistics,
                     handle count, bool through_statistics, bool has_dx, int threads) {
  return answer([&] {
    return gradients_of(library, spec, dy, operands, statistics, count, through_statistics, has_dx, threads);
  });
}

}  // namespace batchnorm
