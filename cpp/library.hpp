// An array library as the kernels use it: the types of its arrays, and allocation of new ones.
#pragma once

#include <vector>

#include "arrays.hpp"

namespace batchnorm {

class Library {
 public:
  // `types`: types of arrays that are read in place. `empty_like(array)` and `empty(shape, dtype name)`: functions of
  // the library. `pooled_like(array)`: like `empty_like`, in a pooled buffer, for large arrays.
  Library(nanobind::tuple types, nanobind::object empty_like, nanobind::object pooled_like, nanobind::object empty);

  // Returns the object, or throws Declined for an array of another type. Any library accepts None.
  nanobind::handle require_own(nanobind::handle object) const;

  // Returns item i of a tuple, or throws Declined for an array of another type.
  nanobind::handle require_own(nanobind::handle tuple, int i) const;

  // An uninitialized array with the dtype, shape and layout of another.
  nanobind::object empty_like(nanobind::handle object, const Array& array) const;

  // An uninitialized, contiguous array of the library, device and kind of the array `x`.
  nanobind::object empty(nanobind::handle x, Element element, int ndim, const int64_t* shape) const;

 private:
  struct Prototype {
    Element element;
    int64_t length;
    nanobind::object array;
  };
  const Prototype& prototype(Element element, int64_t length) const;

  nanobind::tuple types_;
  nanobind::object empty_like_, pooled_like_, empty_;
  mutable std::vector<Prototype> prototypes_;  // of the most recent lengths; guarded by the GIL
};

}  // namespace batchnorm
