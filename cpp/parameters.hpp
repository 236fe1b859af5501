// gamma and beta as a convention applies them, and their gradients.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "operands.hpp"

namespace batchnorm {

// The effective parameters of the convention, for all groups.
class Parameters {
 public:
  Parameters(const Spec& spec, const Operands& operands)
      : spec_(spec), C_(operands.size_along(spec.channel_axes, true, 0)) {
    if (spec.affine == Affine::ignored) return;
    beta_ = per_channel(operands.beta, C_);
    if (spec.affine == Affine::gamma_one || !operands.gamma) return;
    gamma_ = per_channel(operands.gamma, C_);
    if (spec.affine == Affine::plain) return;
    raw_gamma_.reset(new double[C_]);
    effective_gamma_.reset(new double[C_]);
    chosen_kernels().convert(gamma_, {raw_gamma_.get(), Dtype::float64, 1}, C_);
    for (int64_t c = 0; c < C_; ++c) effective_gamma_[c] = std::abs(raw_gamma_[c]) + spec.eps;
    gamma_ = {effective_gamma_.get(), Dtype::float64, 1};
  }

  void bind(Problem& problem, int64_t group) const {
    problem.gamma = of_group(gamma_, group, problem.C), problem.beta = of_group(beta_, group, problem.C);
    problem.activation = spec_.activation, problem.slope = spec_.slope;
    problem.normalized_padding = spec_.normalized_padding;
  }

  // Each lane has its own parameters; the groups of a batch share them.
  PerChannel of_group(const PerChannel& all, int64_t group, int64_t C) const {
    return spec_.has_lanes() ? group_slice(all, group, C) : all;
  }

  bool has_gamma() const { return gamma_.data != nullptr; }
  bool has_beta() const { return beta_.data != nullptr; }
  double effective_gamma_derivative(int64_t c) const {
    return !raw_gamma_ ? 1 : raw_gamma_[c] > 0 ? 1 : raw_gamma_[c] < 0 ? -1 : 0;
  }

 private:
  const Spec& spec_;
  int64_t C_;
  PerChannel gamma_, beta_;
  std::unique_ptr<double[]> raw_gamma_, effective_gamma_;
};

// The gradient of a parameter. The kernels write it directly, or into doubles that are first summed over the groups.
class ParameterGradient {
 public:
  ParameterGradient(const Array& array, int64_t C, bool is_summed) : target_(per_channel(array, C)), C_(C) {
    if (!target_.data || !is_summed) return;
    total_.assign(C, 0);
    group_gradient_.assign(C, 0);
  }

  PerChannel destination() { return total_.empty() ? target_ : PerChannel{group_gradient_.data(), Dtype::float64, 1}; }

  void add_group() {
    for (size_t c = 0; c < total_.size(); ++c) total_[c] += group_gradient_[c];
  }

  template <class Factor> void finish(const Factor& factor) {
    if (total_.empty()) return;
    for (int64_t c = 0; c < C_; ++c) total_[c] *= factor(c);
    chosen_kernels().convert({total_.data(), Dtype::float64, 1}, target_, C_);
  }

 private:
  PerChannel target_;
  int64_t C_;
  std::vector<double> total_, group_gradient_;
};

}  // namespace batchnorm
