// Arrays of any library, read in place (pointer, shape and strides) without a copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "dtypes.hpp"

namespace batchnorm {

constexpr int max_dimensions = 32;

// The reason for which the extension declines a call. Python then validates the arguments and explains what is wrong
// with them. If nothing is wrong, it calls again with another layout or uses the generic implementation.
enum class Refusal : uint8_t {
  type,     // an array is of another library, or its memory cannot be read
  dtype,    // an array has a dtype that is not supported in its place
  shape,    // the shape of an array does not fit x and its channels
  strides,  // no kernel can traverse the arrays together
  state,    // the running statistics are not in their canonical form
  single,   // a channel has a single element, which the convention does not normalize by its own statistics
  eps,      // eps is NaN or above 1e300, or 0 against the convention
  output,   // `out` overlaps an operand, or cannot be written
};

// Thrown below the bindings, which return the reason to Python.
struct Declined { Refusal reason; };

[[noreturn]] inline void decline(Refusal reason) { throw Declined{reason}; }

enum class Element : uint8_t { float32, float64, bfloat16, float16, boolean, int64 };

// Holds the memory of a Python array during its lifetime. PyTorch tensors are read through DLPack's table of C
// functions if they offer it (some 0.1 us instead of several), NumPy arrays through the buffer protocol, all others
// through `__dlpack__`.
class Array {
 public:
  // Absent for None. Throws Declined unless the object is an array in CPU memory with one of the elements above.
  explicit Array(nanobind::handle object, bool is_written = false);
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  explicit operator bool() const { return is_present; }
  int64_t size() const;
  bool is_contiguous() const;
  Dtype dtype() const;  // throws Declined unless floating

  // Narrows the first axis to the indices [begin, begin + length), counted from its current begin. A broadcast axis is
  // not changed.
  void narrow(int64_t begin, int64_t length);

  // Prepends axes of size 1, up to this rank.
  void pad(int rank);

  bool is_present = false;
  void* data = nullptr;
  Element element = Element::float32;
  int ndim = 0;
  int64_t shape[max_dimensions];
  int64_t strides[max_dimensions];  // in elements
  bool has_whole_strides = true;    // strides are multiples of the element size (not so in fields of a packed record)

 private:
  bool read_exchange_api(nanobind::handle object);
  bool read_buffer(nanobind::handle object, bool is_written);
  bool get_buffer(nanobind::handle object, int flags);
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
  bool is_narrowed_ = false;
};

// An uninitialized array with the type, shape and strides of a dense array, in the extension's memory (a large one in a
// pooled buffer). Null if its library cannot take over such memory.
nanobind::object allocate_like(nanobind::handle object, const Array& array);

// An uninitialized, contiguous array of float32, float64 or int64 of the library of `object`. Null if this library
// cannot take over the extension's memory.
nanobind::object allocate_empty(nanobind::handle object, Element element, int ndim, const int64_t* shape);

}  // namespace batchnorm
