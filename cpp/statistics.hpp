// The statistics that a pass reads or writes for each channel.
#pragma once

#include <memory>
#include <vector>

#include "library.hpp"
#include "problem.hpp"

namespace batchnorm {

enum Statistic { mean_row, mean_lo_row, rstd_row, m2_row, xhat_scale_row, statistic_rows };

// The rows of statistics that a pass reads or writes, with the channels of all groups; null for unused rows.
struct StatisticRows {
  void* data[statistic_rows] = {};
  int64_t* count = nullptr;

  void bind(Problem& problem, int64_t group) const {
    const int64_t bytes = problem.C * (problem.dtype == Dtype::float64 ? 8 : 4) * group;
    const auto group_row = [bytes](void* all_groups) -> void* {
      return all_groups ? static_cast<char*>(all_groups) + bytes : nullptr;
    };
    problem.mean = group_row(data[mean_row]), problem.mean_lo = group_row(data[mean_lo_row]),
    problem.rstd = group_row(data[rstd_row]);
    problem.forward.m2 = group_row(data[m2_row]), problem.xhat_scale = group_row(data[xhat_scale_row]);
    problem.count = count ? count + group * problem.C : nullptr;
  }
};

inline Dtype statistics_dtype(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }
inline Element statistics_element(Dtype dtype) { return dtype == Dtype::float64 ? Element::float64 : Element::float32; }

// Given statistics that normalize: results of `normalize`, or statistics that a caller has computed.
class GivenStatistics {
 public:
  // `channels`: the number of channels of all groups.
  GivenStatistics(const Library& library, nanobind::handle statistics, Dtype dtype, int64_t channels) {
    const auto read = [&](nanobind::handle object) -> const Array& {
      arrays_.emplace_back(new Array(library.require_own(object)));
      const Array& array = *arrays_.back();
      if (!array) decline(Refusal::shape);
      if (array.element != statistics_element(dtype)) decline(Refusal::dtype);
      if (!array.is_contiguous()) decline(Refusal::strides);
      return array;
    };
    if (PyTuple_Check(statistics.ptr())) {
      if (NB_TUPLE_GET_SIZE(statistics.ptr()) != 3) decline(Refusal::shape);
      for (int i = 0; i < 3; ++i) {
        const Array& array = read(nanobind::handle(NB_TUPLE_GET_ITEM(statistics.ptr(), i)));
        if (array.size() != channels) decline(Refusal::shape);
        rows.data[i] = array.data;
      }
      return;
    }
    const Array& table = read(statistics);
    if (table.ndim != 2 || table.shape[1] != channels || (table.shape[0] != 3 && table.shape[0] != 4))
      decline(Refusal::shape);
    for (int i = 0; i < table.shape[0]; ++i)
      rows.data[i < 3 ? i : xhat_scale_row] =
          static_cast<char*>(table.data) + i * channels * size_of(statistics_dtype(dtype));
  }

  StatisticRows rows;

 private:
  std::vector<std::unique_ptr<Array>> arrays_;
};

}  // namespace batchnorm
