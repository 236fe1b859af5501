// The part of XLA's foreign function interface that xla.cpp uses: version 0.1, which jaxlib has had since 0.8.0.
//
// These are declarations of our own, so that a build needs neither JAX nor its headers, and every wheel works with JAX.
// XLA promises a C ABI: within a major version fields keep their offsets, and a minor version only appends fields,
// which shows in the size at the start of each struct. Targets report this version to XLA and check these sizes in each
// call (xla.cpp). cpp/tests/xla_abi.cpp compares every offset, size and number with the headers of an installed jaxlib.
//
// Source: xla/ffi/api/c_api.h in the wheels of jaxlib 0.8.0 (version 0.1), 0.9.0 (0.2) and 0.10.2 (0.3).
#pragma once

#include <cstddef>
#include <cstdint>

namespace batchnorm::xla {

inline constexpr int major_version = 0, minor_version = 1;

struct Error;             // null: success; owned by the receiver
struct ExecutionContext;  // opaque

enum class ErrorCode : int32_t { invalid_argument = 3, resource_exhausted = 8, internal = 13 };
enum class DataType : int32_t { pred = 1, s32 = 4, s64 = 5, f16 = 10, f32 = 11, f64 = 12, bf16 = 16 };
enum class ArgType : int32_t { buffer = 1 };
enum class RetType : int32_t { buffer = 1 };
enum class AttrType : int32_t { scalar = 3 };
enum class ExtensionType : int32_t { metadata = 1 };
enum class Stage : int32_t { execute = 3 };

struct Extension {
  size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extensions;
  int major, minor;
};

// A dense row-major array.
struct Buffer {
  size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Name {
  const char* data;
  size_t size;
};

struct Scalar {
  DataType dtype;
  void* value;
};

struct Args {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  ArgType* types;
  void** args;
};

struct Rets {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  RetType* types;
  void** rets;
};

// Sorted by name.
struct Attrs {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  AttrType* types;
  Name** names;
  void** attrs;
};

struct Api;

// One call of a target. With an extension `Metadata`, it asks for the version that the target is compiled for.
struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  ExecutionContext* context;
  Stage stage;
  Args args;
  Rets rets;
  Attrs attrs;
};

struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
  int64_t state_type;  // 0: without a state
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct ErrorCreate {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct ErrorDestroy {
  size_t struct_size;
  Extension* extensions;
  Error* error;
};

struct ThreadPoolSchedule {
  size_t struct_size;
  Extension* extensions;
  ExecutionContext* context;
  void (*task)(void* data);
  void* data;
};

struct ThreadPoolNumThreads {
  size_t struct_size;
  Extension* extensions;
  ExecutionContext* context;
  int64_t* num_threads;
};

// XLA's functions; more follow the last one.
struct Api {
  using Unused = void (*)();

  size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*error_create)(ErrorCreate*);
  Unused error_get_message;
  void (*error_destroy)(ErrorDestroy*);
  Unused handler_register, stream_get, type_register, context_get, state_set, state_get, memory_allocate, memory_free;
  Error* (*thread_pool_schedule)(ThreadPoolSchedule*);
  Error* (*thread_pool_num_threads)(ThreadPoolNumThreads*);
};

}  // namespace batchnorm::xla
