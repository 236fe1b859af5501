#include "library.hpp"

#include "memory.hpp"

namespace nb = nanobind;

namespace batchnorm {
namespace {

const char* name_of(Element element) {
  return element == Element::int64 ? "int64" : element == Element::float64 ? "float64" : "float32";
}

}  // namespace

Library::Library(nb::tuple types, nb::object empty_like, nb::object pooled_like, nb::object empty)
    : types_(types), empty_like_(empty_like), pooled_like_(pooled_like), empty_(empty) {}

nb::handle Library::require_own(nb::handle object) const {
  if (object.is_none()) return object;
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  for (Py_ssize_t i = 0; i < NB_TUPLE_GET_SIZE(types_.ptr()); ++i)
    if (NB_TUPLE_GET_ITEM(types_.ptr(), i) == type) return object;
  decline(Refusal::type);
}

nb::handle Library::require_own(nb::handle tuple, int i) const {
  return require_own(nb::handle(NB_TUPLE_GET_ITEM(tuple.ptr(), i)));
}

nb::object Library::empty_like(nb::handle object, const Array& array) const {
  nb::object result = allocate_like(object, array);
  if (result) return result;
  const bool is_large = array.size() * size_of(array.dtype()) >= min_pooled_bytes;
  return (is_large ? pooled_like_ : empty_like_)(object);
}

nb::object Library::empty(nb::handle x, Element element, int ndim, const int64_t* shape) const {
  nb::object result = allocate_empty(x, element, ndim, shape);
  if (result) return result;
  if (ndim == 1) return empty_like_(prototype(element, shape[0]).array);
  nb::list sizes;
  for (int i = 0; i < ndim; ++i) sizes.append(shape[i]);
  return empty_(nb::tuple(sizes), name_of(element));
}

// `empty_like` of an array takes half the time of `empty` of a shape and a dtype.
const Library::Prototype& Library::prototype(Element element, int64_t length) const {
  constexpr size_t max_prototypes = 16;
  for (const Prototype& known : prototypes_)
    if (known.element == element && known.length == length) return known;
  if (prototypes_.size() == max_prototypes) prototypes_.erase(prototypes_.begin());
  prototypes_.push_back({element, length, empty_(nb::make_tuple(length), name_of(element))});
  return prototypes_.back();
}

}  // namespace batchnorm
