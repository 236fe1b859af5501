// Arrays of any library, seen in place: pointer, shape and strides. Nothing is copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "dtypes.hpp"

namespace batchnorm {

constexpr int most_dimensions = 32;

// What an array holds; uint16 is taken for bfloat16, for which NumPy has no buffer format.
enum class Element : uint8_t { float32, float64, bfloat16, float16, byte, int64 };

// Holds on to the memory of a Python array while it exists. PyTorch tensors are read through DLPack's table of C
// functions where they offer it (some 0.1 us in place of several), NumPy arrays through the buffer protocol, all others
// through `__dlpack__`.
class Array {
 public:
  // Raises TypeError or ValueError, with `name` in the message; nothing is there for None.
  Array(const char* name, nanobind::handle object, bool is_written = false);
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  explicit operator bool() const { return data != nullptr || is_given; }
  int64_t size() const;
  bool is_contiguous() const;
  Dtype dtype() const;  // raises TypeError unless floating

  const char* name;
  bool is_given = false;
  void* data = nullptr;
  Element element = Element::float32;
  int ndim = 0;
  int64_t shape[most_dimensions];
  int64_t strides[most_dimensions];  // in elements,
  bool has_whole_strides = true;     // which the strides may be no multiples of (fields of a packed record)

 private:
  bool read_dlpack_table(nanobind::handle object);
  bool read_buffer(nanobind::handle object, bool is_written);
  void read_dlpack(nanobind::handle object);
  void read_tensor(const nanobind::dlpack::dltensor& tensor);
  void read_element(uint8_t code, uint8_t bits);

  struct Buffer {
    Py_buffer view;
    bool is_held = false;
    ~Buffer() {
      if (is_held) PyBuffer_Release(&view);
    }
  } buffer_;
  nanobind::ndarray<nanobind::ro> holder_;
};

// An uninitialised array of the type, shape and strides of a dense one, in memory of our own (a large one in that of
// memory.hpp); null where its library cannot be handed one.
nanobind::object own_like(nanobind::handle object, const Array& array);

// `length` uninitialised numbers (float32, float64, int64) in an array of the library of `object`, or so many rows of
// them. Raises TypeError where it cannot be handed one.
nanobind::object table_for(nanobind::handle object, Element element, int64_t length, int64_t rows = 0);

}  // namespace batchnorm
