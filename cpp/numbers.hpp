// What a pass writes or reads of each channel: statistics, and what goes with them.
#pragma once

#include <memory>
#include <vector>

#include "library.hpp"
#include "problem.hpp"

namespace batchnorm {

enum Row { mean_row, mean_lo_row, rstd_row, m2_row, factor_row, rows };

// What a pass writes or reads of each channel of each group; null where it does neither.
struct Numbers {
  void* at[rows] = {};
  int64_t* count = nullptr;

  void enter(Problem& problem, int64_t group) const {
    const int64_t bytes = problem.C * (problem.dtype == Dtype::float64 ? 8 : 4) * group;
    const auto part = [bytes](void* all) -> void* { return all ? static_cast<char*>(all) + bytes : nullptr; };
    problem.mean = part(at[mean_row]), problem.mean_lo = part(at[mean_lo_row]), problem.rstd = part(at[rstd_row]);
    problem.forward.m2 = part(at[m2_row]), problem.factor = part(at[factor_row]);
    problem.count = count ? count + group * problem.C : nullptr;
  }
};

inline Dtype wide_of(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }
inline Element element_of(Dtype dtype) { return dtype == Dtype::float64 ? Element::float64 : Element::float32; }

// Statistics that normalize, as `normalize` returned them or a caller computed them.
class GivenStatistics {
 public:
  // `number`: of channels, of all groups.
  GivenStatistics(const Library& library, nanobind::handle statistics, Dtype dtype, int64_t number) {
    const auto read = [&](nanobind::handle object) -> const Array& {
      arrays_.emplace_back(new Array(library.own(object)));
      const Array& array = *arrays_.back();
      if (!array) decline(Refusal::shape);
      if (array.element != element_of(dtype)) decline(Refusal::dtype);
      if (!array.is_contiguous()) decline(Refusal::strides);
      return array;
    };
    if (PyTuple_Check(statistics.ptr())) {
      if (NB_TUPLE_GET_SIZE(statistics.ptr()) != 3) decline(Refusal::shape);
      for (int i = 0; i < 3; ++i) {
        const Array& array = read(nanobind::handle(NB_TUPLE_GET_ITEM(statistics.ptr(), i)));
        if (array.size() != number) decline(Refusal::shape);
        numbers.at[i] = array.data;
      }
      return;
    }
    const Array& table = read(statistics);
    if (table.ndim != 2 || table.shape[1] != number || (table.shape[0] != 3 && table.shape[0] != 4))
      decline(Refusal::shape);
    for (int i = 0; i < table.shape[0]; ++i)
      numbers.at[i < 3 ? i : factor_row] = static_cast<char*>(table.data) + i * number * size_of(wide_of(dtype));
  }

  Numbers numbers;

 private:
  std::vector<std::unique_ptr<Array>> arrays_;
};

}  // namespace batchnorm
