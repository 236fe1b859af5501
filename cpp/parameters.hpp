// gamma and beta as a convention applies them, and their gradients.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "operands.hpp"

namespace batchnorm {

// What the convention makes of the parameters, for all groups.
class Parameters {
 public:
  Parameters(const Spec& spec, const Operands& operands)
      : spec_(spec), C_(operands.size_along(spec.channel_axes, true, 0)) {
    if (spec.affine == Affine::ignored) return;
    beta_ = channels(operands.beta, C_);
    if (spec.affine == Affine::gamma_one || !operands.gamma) return;
    gamma_ = channels(operands.gamma, C_);
    if (spec.affine == Affine::plain) return;
    given_.reset(new double[C_]);
    effective_.reset(new double[C_]);
    chosen_kernels().convert(gamma_, {given_.get(), Dtype::float64, 1}, C_);
    for (int64_t c = 0; c < C_; ++c) effective_[c] = std::abs(given_[c]) + spec.eps;
    gamma_ = {effective_.get(), Dtype::float64, 1};
  }

  void enter(Problem& problem, int64_t group) const {
    problem.gamma = of_group(gamma_, group, problem.C), problem.beta = of_group(beta_, group, problem.C);
    problem.activation = spec_.activation, problem.slope = spec_.slope;
    problem.normalized_padding = spec_.normalized_padding;
  }

  // Lanes have parameters of their own, groups of one batch share them.
  Channels of_group(const Channels& all, int64_t group, int64_t C) const {
    return spec_.has_lanes() ? part_of(all, group, C) : all;
  }

  bool has_gamma() const { return gamma_.data != nullptr; }
  bool has_beta() const { return beta_.data != nullptr; }
  double derivative_of_gamma(int64_t c) const { return !given_ ? 1 : given_[c] > 0 ? 1 : given_[c] < 0 ? -1 : 0; }

 private:
  const Spec& spec_;
  int64_t C_;
  Channels gamma_, beta_;
  std::unique_ptr<double[]> given_, effective_;
};

// The gradient of a parameter. The kernels write into it, or into doubles that are summed over the groups first.
class ParameterGradient {
 public:
  ParameterGradient(const Array& array, int64_t C, bool is_summed) : target_(channels(array, C)), C_(C) {
    if (!target_.data || !is_summed) return;
    total_.assign(C, 0);
    part_.assign(C, 0);
  }

  Channels part() { return total_.empty() ? target_ : Channels{part_.data(), Dtype::float64, 1}; }

  void add() {
    for (size_t c = 0; c < total_.size(); ++c) total_[c] += part_[c];
  }

  template <class Factor> void finish(const Factor& factor) {
    if (total_.empty()) return;
    for (int64_t c = 0; c < C_; ++c) total_[c] *= factor(c);
    chosen_kernels().convert({total_.data(), Dtype::float64, 1}, target_, C_);
  }

 private:
  Channels target_;
  int64_t C_;
  std::vector<double> total_, part_;
};

}  // namespace batchnorm
