// The element types.
#pragma once

#include <cstdint>

namespace batchnorm {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Element i of an array of T in a caller's memory, which may be unaligned (a view into a packed buffer). A load through
// a T* would be undefined behavior, and it traps on some ARM processors. Always inlined (see kernels.cpp).
template <class T> inline __attribute__((always_inline)) T element_at(const void* data, int64_t i) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(data) + i * static_cast<int64_t>(sizeof(T)), sizeof value);
  return value;
}
template <class T> inline __attribute__((always_inline)) void set_element(void* data, int64_t i, T value) {
  __builtin_memcpy(static_cast<char*>(data) + i * static_cast<int64_t>(sizeof(T)), &value, sizeof value);
}

}  // namespace batchnorm
