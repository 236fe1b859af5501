#include "arrays.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "memory.hpp"

namespace nb = nanobind;

namespace batchnorm {
namespace {

struct Version { uint32_t major, minor; };

// DLManagedTensorVersioned of dlpack.h.
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  nb::dlpack::dltensor tensor;
};

// The members of DLPack 1.2's table of C functions that are used here (DLPackExchangeAPI of dlpack.h).
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void *allocate, *to_managed;
  int (*from_managed)(ManagedTensor* tensor, void** object);
  int (*view)(void* object, nb::dlpack::dltensor* out);  // without ownership; null if not offered
};

// The table of C functions of a type; null if it has none. The latest four answers are cached, because the arrays of a
// program have one or two types (PyTorch's tensors and parameters). Guarded by the GIL.
ExchangeApi* exchange_api(PyTypeObject* type) {
  struct CachedApi {
    PyTypeObject* type;
    ExchangeApi* api;
  };
  static CachedApi cached[4] = {};
  static int next = 0;
  for (const CachedApi& entry : cached)
    if (entry.type == type) return entry.api;
  ExchangeApi* api = nullptr;
  nb::object capsule =
      nb::getattr(nb::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->version.major != 1 || !api->view) api = nullptr;
  }
  Py_INCREF(reinterpret_cast<PyObject*>(type));  // while it is cached, since the address identifies the type
  CachedApi& slot = cached[next++ % 4];
  PyTypeObject* const evicted = slot.type;
  slot = {type, api};
  Py_XDECREF(reinterpret_cast<PyObject*>(evicted));
  return api;
}

constexpr uint8_t dlpack_int = 0, dlpack_float = 2, dlpack_bfloat = 4, dlpack_bool = 6;

// An array in the extension's memory, for another library to take over. The elements of large arrays are in pooled
// buffers, those of others follow this struct.
struct OwnedTensor : ManagedTensor {
  int64_t bytes;
  int64_t shape_and_strides[2 * max_dimensions];

  static OwnedTensor* allocate(int ndim, const int64_t* shape, const int64_t* strides, nb::dlpack::dtype dtype,
                               int64_t bytes) {
    const bool is_large = bytes >= min_pooled_bytes;
    constexpr int64_t header_bytes = (sizeof(OwnedTensor) + 63) / 64 * 64;
    void* const memory = ::operator new(header_bytes + (is_large ? 0 : bytes), std::align_val_t{64});
    OwnedTensor* const owned = new (memory) OwnedTensor;
    owned->bytes = bytes;
    owned->version = {1, 2};
    owned->context = nullptr;
    owned->deleter = release;
    owned->flags = 0;
    std::copy_n(shape, ndim, owned->shape_and_strides);
    std::copy_n(strides, ndim, owned->shape_and_strides + ndim);
    void* data = static_cast<char*>(memory) + header_bytes;
    if (is_large) {
      try {
        data = allocate_pooled(bytes);
      } catch (...) {
        owned->bytes = 0;
        release(owned);
        throw;
      }
    }
    owned->tensor = {
        data, {nb::device::cpu::value, 0}, ndim, dtype, owned->shape_and_strides, owned->shape_and_strides + ndim, 0};
    return owned;
  }

  static void release(ManagedTensor* self) {
    const int64_t bytes = static_cast<OwnedTensor*>(self)->bytes;
    if (bytes >= min_pooled_bytes) deallocate_pooled(self->tensor.data, bytes);
    ::operator delete(self, std::align_val_t{64});
  }
};

nb::object export_tensor(const ExchangeApi* api, OwnedTensor* owned) {
  void* object = nullptr;
  if (api->from_managed(owned, &object) != 0) {
    OwnedTensor::release(owned);
    throw nb::python_error();
  }
  return nb::steal(static_cast<PyObject*>(object));
}

// True if the elements fill contiguous memory, in any order of the axes.
bool is_dense(const Array& array) {
  int axes[max_dimensions], rank = 0;
  for (int i = 0; i < array.ndim; ++i)
    if (array.shape[i] != 1) axes[rank++] = i;
  std::sort(axes, axes + rank, [&](int a, int b) { return array.strides[a] < array.strides[b]; });
  int64_t expected = 1;
  for (int i = 0; i < rank; ++i) {
    if (array.strides[axes[i]] != expected) return false;
    expected *= array.shape[axes[i]];
  }
  return true;
}

}  // namespace

namespace {

// Handles an error raised by an array's library, which declines the call: the array has no readable memory. Other
// errors (no memory, interrupts) are thrown again.
[[noreturn]] void decline_or_rethrow(nb::python_error& error) {
  if (error.matches(PyExc_MemoryError) || !error.matches(PyExc_Exception)) throw error;
  decline(Refusal::type);
}

}  // namespace

Array::Array(nb::handle object, bool is_written) {
  if (object.is_none()) return;
  is_present = true;
  if (!read_exchange_api(object) && !read_buffer(object, is_written)) read_dlpack(object);
}

bool Array::read_exchange_api(nb::handle object) {
  ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  if (!api) return false;
  nb::dlpack::dltensor tensor;
  if (api->view(object.ptr(), &tensor) != 0) {
    nb::python_error error;
    decline_or_rethrow(error);
  }
  read_tensor(tensor);
  return true;
}

bool Array::get_buffer(nb::handle object, int flags) {
  buffer_.is_held = PyObject_GetBuffer(object.ptr(), &buffer_.view, flags) == 0;
  if (!buffer_.is_held) PyErr_Clear();
  return buffer_.is_held;
}

bool Array::read_buffer(nb::handle object, bool is_written) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (is_written ? PyBUF_WRITABLE : 0);
  // bfloat16 is an extension type of NumPy without a buffer format, so such an array is read as uint16.
  bool is_bfloat16 = false;
  if (!get_buffer(object, flags)) {
    try {
      const nb::object dtype = object.attr("dtype");
      is_bfloat16 = std::strcmp(nb::str(dtype).c_str(), "bfloat16") == 0;
      if (!is_bfloat16 || !get_buffer(object.attr("view")("uint16"), flags)) decline(Refusal::type);
    } catch (nb::python_error& error) {
      decline_or_rethrow(error);
    }
  }
  const Py_buffer& view = buffer_.view;
  if (view.ndim > max_dimensions || (view.ndim && !view.strides)) decline(Refusal::shape);
  const char* format = view.format ? view.format : "";
  if (*format == '@' || *format == '=') ++format;
  const char code = std::strlen(format) == 1 ? *format : '\0';
  if (is_bfloat16) element = Element::bfloat16;
  else if (code == 'f') element = Element::float32;
  else if (code == 'd') element = Element::float64;
  else if (code == 'e') element = Element::float16;
  else if (code == '?') element = Element::boolean;
  else if (code == 'l' || code == 'q') element = Element::int64;
  else decline(Refusal::dtype);
  data = view.buf;
  ndim = view.ndim;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[i] = view.shape[i];
    strides[i] = view.strides[i] / view.itemsize;
    has_whole_strides &= shape[i] <= 1 || strides[i] * view.itemsize == view.strides[i];
  }
  return true;
}

void Array::read_dlpack(nb::handle object) {
  if (!nb::try_cast(object, holder_) || !holder_.is_valid()) decline(Refusal::type);
  nb::dlpack::dltensor tensor;
  tensor.data = const_cast<void*>(holder_.data());
  tensor.device = {holder_.device_type(), holder_.device_id()};
  tensor.ndim = static_cast<int32_t>(holder_.ndim());
  tensor.dtype = holder_.dtype();
  tensor.shape = const_cast<int64_t*>(holder_.shape_ptr());
  tensor.strides = const_cast<int64_t*>(holder_.stride_ptr());
  read_tensor(tensor);
}

void Array::read_tensor(const nb::dlpack::dltensor& tensor) {
  if (tensor.device.device_type != nb::device::cpu::value) decline(Refusal::type);
  if (tensor.ndim > max_dimensions) decline(Refusal::shape);
  read_element(tensor.dtype.code, tensor.dtype.bits);
  data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  ndim = tensor.ndim;
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[i] = tensor.shape[i];
    strides[i] = tensor.strides ? tensor.strides[i] : expected;
    expected *= shape[i];
  }
  if (!data && size() > 0) decline(Refusal::type);  // PyTorch's tensors of symbolic zeros
}

void Array::read_element(uint8_t code, uint8_t bits) {
  if (code == dlpack_float && bits == 32) element = Element::float32;
  else if (code == dlpack_float && bits == 64) element = Element::float64;
  else if (code == dlpack_float && bits == 16) element = Element::float16;
  else if (code == dlpack_bfloat && bits == 16) element = Element::bfloat16;
  else if (code == dlpack_bool && bits == 8) element = Element::boolean;
  else if (code == dlpack_int && bits == 64) element = Element::int64;
  else decline(Refusal::dtype);
}

int64_t Array::size() const {
  int64_t size = 1;
  for (int i = 0; i < ndim; ++i) size *= shape[i];
  return size;
}

bool Array::is_contiguous() const {
  if (!has_whole_strides) return false;
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] > 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

Dtype Array::dtype() const {
  if (element > Element::float16) decline(Refusal::dtype);
  return static_cast<Dtype>(element);
}

void Array::narrow(int64_t begin, int64_t length) {
  if (!is_present || (shape[0] == 1 && !is_narrowed_)) return;
  is_narrowed_ = true;
  const int64_t bytes = element == Element::boolean ? 1
                        : element == Element::int64 ? 8
                                                    : size_of(static_cast<Dtype>(element));
  data = static_cast<char*>(data) + begin * strides[0] * bytes;
  shape[0] = length;
}

void Array::pad(int rank) {
  if (!is_present || ndim >= rank) return;
  const int added = rank - ndim;
  std::copy_backward(shape, shape + ndim, shape + rank);
  std::copy_backward(strides, strides + ndim, strides + rank);
  std::fill_n(shape, added, 1);
  std::fill_n(strides, added, 0);
  ndim = rank;
}

nb::object allocate_like(nb::handle object, const Array& array) {
  const int64_t bytes = array.size() * size_of(array.dtype());
  const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  if (!api || !api->from_managed || !is_dense(array)) return {};
  const uint8_t code = array.element == Element::bfloat16 ? dlpack_bfloat : dlpack_float;
  const nb::dlpack::dtype dtype{code, static_cast<uint8_t>(8 * size_of(array.dtype())), 1};
  return export_tensor(api, OwnedTensor::allocate(array.ndim, array.shape, array.strides, dtype, bytes));
}

nb::object allocate_empty(nb::handle object, Element element, int ndim, const int64_t* shape) {
  const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  if (!api || !api->from_managed) return {};
  const uint8_t bits = element == Element::float32 ? 32 : 64;
  int64_t strides[max_dimensions], size = 1;
  for (int i = ndim - 1; i >= 0; --i) strides[i] = size, size *= shape[i];
  const nb::dlpack::dtype dtype{element == Element::int64 ? dlpack_int : dlpack_float, bits, 1};
  return export_tensor(api, OwnedTensor::allocate(ndim, shape, strides, dtype, size * bits / 8));
}

}  // namespace batchnorm
