// Arrays of any library, seen in place: pointer, shape and strides. Nothing is copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "dtypes.hpp"

namespace batchnorm {

constexpr int max_dimensions = 32;

// Why the extension declines a call. Python validates the arguments then, and explains what is wrong with them; what is
// not wrong goes to it again in another layout, or is computed by the generic implementation.
enum class Refusal : uint8_t {
  type,     // an array is of another library, or in memory that cannot be read
  dtype,    // or of a dtype that does not belong there
  shape,    // or of another shape than x and its channels demand
  strides,  // no kernel can walk over the arrays together
  state,    // running statistics are not in their canonical form
  single,   // a channel has one element, which the convention does not normalize by itself
  eps,      // eps is 0, or beyond any use
  output,   // `out` overlaps an operand, or cannot be written
};

// Thrown below the bindings, which return the reason.
struct Declined { Refusal reason; };

[[noreturn]] inline void decline(Refusal reason) { throw Declined{reason}; }

enum class Element : uint8_t { float32, float64, bfloat16, float16, boolean, int64 };

// Holds on to the memory of a Python array while it exists. PyTorch tensors are read through DLPack's table of C
// functions where they offer it (some 0.1 us in place of several), NumPy arrays through the buffer protocol, all others
// through `__dlpack__`.
class Array {
 public:
  // Absent for None. Throws Declined for what is no array of these elements in the CPU's memory.
  explicit Array(nanobind::handle object, bool is_written = false);
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  explicit operator bool() const { return is_present; }
  int64_t size() const;
  bool is_contiguous() const;
  Dtype dtype() const;  // throws Declined unless floating

  // From here on the indices [begin, begin + length) of the first axis, from where it begins now; all of an axis that
  // broadcasts.
  void narrow(int64_t begin, int64_t length);

  // Axes of size 1 in front, up to this rank.
  void pad(int rank);

  bool is_present = false;
  void* data = nullptr;
  Element element = Element::float32;
  int ndim = 0;
  int64_t shape[max_dimensions];
  int64_t strides[max_dimensions];  // in elements,
  bool has_whole_strides = true;    // which the strides may be no multiples of (fields of a packed record)

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

// An uninitialised array of the type, shape and strides of a dense one, in memory of our own (a large one in that of
// memory.hpp); null where its library cannot be handed one.
nanobind::object allocate_like(nanobind::handle object, const Array& array);

// An uninitialised, contiguous array of float32, float64 or int64 for the library of `object`; null where that cannot be
// handed one.
nanobind::object allocate_empty(nanobind::handle object, Element element, int ndim, const int64_t* shape);

}  // namespace batchnorm
