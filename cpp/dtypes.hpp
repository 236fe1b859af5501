// The element types.
#pragma once

#include <cstdint>

namespace batchnorm {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

enum class Dtype : uint8_t { float32, float64, bfloat16, float16 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

}  // namespace batchnorm
