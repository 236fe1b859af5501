// An array library as the kernels use it: which arrays are its own, and how new ones are made.
#pragma once

#include <vector>

#include "arrays.hpp"

namespace batchnorm {

class Library {
 public:
  // `types`: of the arrays that are read as they are. `empty_like(array)`, `empty(shape, dtype name)`: the library's own
  // functions; `pooled_like(array)` takes the memory of a large array from memory.hpp.
  Library(nanobind::tuple types, nanobind::object empty_like, nanobind::object pooled_like, nanobind::object empty);

  // The object itself; throws Declined for an array of another type. None is of every library.
  nanobind::handle require_own(nanobind::handle object) const;

  // Item i of a tuple, likewise.
  nanobind::handle require_own(nanobind::handle tuple, int i) const;

  // An uninitialised array of the dtype, shape and layout of another.
  nanobind::object empty_like(nanobind::handle object, const Array& array) const;

  // An uninitialised, contiguous array beside the array `x`.
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
  mutable std::vector<Prototype> prototypes_;  // guarded by the GIL; the last few lengths
};

}  // namespace batchnorm
