// Compiles only if xla_abi.hpp agrees with XLA's own header on the offset and size of each field and on each number.
//
//     c++ -std=c++20 -fsyntax-only -Icpp -I"$(python -c 'import jax; print(jax.ffi.include_dir())')" cpp/tests/xla_abi.cpp
#include "xla_abi.hpp"

#include <type_traits>

#include "xla/ffi/api/c_api.h"

namespace xla = batchnorm::xla;

#define SAME_FIELD(ours, field, theirs, their_field)                           \
  static_assert(offsetof(xla::ours, field) == offsetof(theirs, their_field) && \
                sizeof(xla::ours::field) == sizeof(theirs::their_field))

#define SAME_NUMBER(ours, theirs) static_assert(static_cast<int64_t>(xla::ours) == static_cast<int64_t>(theirs))

// The first fields of every struct.
#define SAME_HEAD(ours, theirs)                       \
  SAME_FIELD(ours, struct_size, theirs, struct_size); \
  SAME_FIELD(ours, extensions, theirs, extension_start)

// For structs that XLA embeds in others, or refuses unless they have this size.
#define SAME_SIZE(ours, theirs) \
  static_assert(sizeof(xla::ours) == sizeof(theirs) && sizeof(xla::ours) == theirs##_STRUCT_SIZE)

// The interface is at least as new, and has the same offsets.
static_assert(XLA_FFI_API_MAJOR == xla::major_version && XLA_FFI_API_MINOR >= xla::minor_version);

SAME_NUMBER(ErrorCode::invalid_argument, XLA_FFI_Error_Code_INVALID_ARGUMENT);
SAME_NUMBER(ErrorCode::resource_exhausted, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
SAME_NUMBER(ErrorCode::internal, XLA_FFI_Error_Code_INTERNAL);
SAME_NUMBER(DataType::pred, XLA_FFI_DataType_PRED);
SAME_NUMBER(DataType::s32, XLA_FFI_DataType_S32);
SAME_NUMBER(DataType::s64, XLA_FFI_DataType_S64);
SAME_NUMBER(DataType::f16, XLA_FFI_DataType_F16);
SAME_NUMBER(DataType::f32, XLA_FFI_DataType_F32);
SAME_NUMBER(DataType::f64, XLA_FFI_DataType_F64);
SAME_NUMBER(DataType::bf16, XLA_FFI_DataType_BF16);
SAME_NUMBER(ArgType::buffer, XLA_FFI_ArgType_BUFFER);
SAME_NUMBER(RetType::buffer, XLA_FFI_RetType_BUFFER);
SAME_NUMBER(AttrType::scalar, XLA_FFI_AttrType_SCALAR);
SAME_NUMBER(ExtensionType::metadata, XLA_FFI_Extension_Metadata);
SAME_NUMBER(Stage::execute, XLA_FFI_ExecutionStage_EXECUTE);

SAME_SIZE(Extension, XLA_FFI_Extension_Base);
SAME_FIELD(Extension, struct_size, XLA_FFI_Extension_Base, struct_size);
SAME_FIELD(Extension, type, XLA_FFI_Extension_Base, type);
SAME_FIELD(Extension, next, XLA_FFI_Extension_Base, next);

SAME_SIZE(Version, XLA_FFI_Api_Version);
SAME_HEAD(Version, XLA_FFI_Api_Version);
SAME_FIELD(Version, major, XLA_FFI_Api_Version, major_version);
SAME_FIELD(Version, minor, XLA_FFI_Api_Version, minor_version);

SAME_HEAD(Buffer, XLA_FFI_Buffer);
SAME_FIELD(Buffer, dtype, XLA_FFI_Buffer, dtype);
SAME_FIELD(Buffer, data, XLA_FFI_Buffer, data);
SAME_FIELD(Buffer, rank, XLA_FFI_Buffer, rank);
SAME_FIELD(Buffer, dims, XLA_FFI_Buffer, dims);
static_assert(sizeof(xla::Buffer) <= XLA_FFI_Buffer_STRUCT_SIZE);

SAME_FIELD(Name, data, XLA_FFI_ByteSpan, ptr);
SAME_FIELD(Name, size, XLA_FFI_ByteSpan, len);
SAME_FIELD(Scalar, dtype, XLA_FFI_Scalar, dtype);
SAME_FIELD(Scalar, value, XLA_FFI_Scalar, value);

SAME_SIZE(Args, XLA_FFI_Args);
SAME_HEAD(Args, XLA_FFI_Args);
SAME_FIELD(Args, size, XLA_FFI_Args, size);
SAME_FIELD(Args, types, XLA_FFI_Args, types);
SAME_FIELD(Args, args, XLA_FFI_Args, args);

SAME_SIZE(Rets, XLA_FFI_Rets);
SAME_HEAD(Rets, XLA_FFI_Rets);
SAME_FIELD(Rets, size, XLA_FFI_Rets, size);
SAME_FIELD(Rets, types, XLA_FFI_Rets, types);
SAME_FIELD(Rets, rets, XLA_FFI_Rets, rets);

SAME_SIZE(Attrs, XLA_FFI_Attrs);
SAME_HEAD(Attrs, XLA_FFI_Attrs);
SAME_FIELD(Attrs, size, XLA_FFI_Attrs, size);
SAME_FIELD(Attrs, types, XLA_FFI_Attrs, types);
SAME_FIELD(Attrs, names, XLA_FFI_Attrs, names);
SAME_FIELD(Attrs, attrs, XLA_FFI_Attrs, attrs);

SAME_HEAD(CallFrame, XLA_FFI_CallFrame);
SAME_FIELD(CallFrame, api, XLA_FFI_CallFrame, api);
SAME_FIELD(CallFrame, context, XLA_FFI_CallFrame, ctx);
SAME_FIELD(CallFrame, stage, XLA_FFI_CallFrame, stage);
SAME_FIELD(CallFrame, args, XLA_FFI_CallFrame, args);
SAME_FIELD(CallFrame, rets, XLA_FFI_CallFrame, rets);
SAME_FIELD(CallFrame, attrs, XLA_FFI_CallFrame, attrs);
static_assert(sizeof(xla::CallFrame) <= XLA_FFI_CallFrame_STRUCT_SIZE);
static_assert(std::is_same_v<decltype(&XLA_FFI_Handler_Bundle::execute),
                             XLA_FFI_Error* (*XLA_FFI_Handler_Bundle::*)(XLA_FFI_CallFrame*)>);

SAME_FIELD(Metadata, struct_size, XLA_FFI_Metadata, struct_size);
SAME_FIELD(Metadata, version, XLA_FFI_Metadata, api_version);
SAME_FIELD(Metadata, traits, XLA_FFI_Metadata, traits);
SAME_FIELD(Metadata, state_type, XLA_FFI_Metadata, state_type_id);
SAME_FIELD(MetadataExtension, base, XLA_FFI_Metadata_Extension, extension_base);
SAME_FIELD(MetadataExtension, metadata, XLA_FFI_Metadata_Extension, metadata);

SAME_HEAD(ErrorCreate, XLA_FFI_Error_Create_Args);
SAME_FIELD(ErrorCreate, message, XLA_FFI_Error_Create_Args, message);
SAME_FIELD(ErrorCreate, code, XLA_FFI_Error_Create_Args, errc);
SAME_HEAD(ErrorDestroy, XLA_FFI_Error_Destroy_Args);
SAME_FIELD(ErrorDestroy, error, XLA_FFI_Error_Destroy_Args, error);
SAME_HEAD(ThreadPoolSchedule, XLA_FFI_ThreadPool_Schedule_Args);
SAME_FIELD(ThreadPoolSchedule, context, XLA_FFI_ThreadPool_Schedule_Args, ctx);
SAME_FIELD(ThreadPoolSchedule, task, XLA_FFI_ThreadPool_Schedule_Args, task);
SAME_FIELD(ThreadPoolSchedule, data, XLA_FFI_ThreadPool_Schedule_Args, data);
SAME_HEAD(ThreadPoolNumThreads, XLA_FFI_ThreadPool_NumThreads_Args);
SAME_FIELD(ThreadPoolNumThreads, context, XLA_FFI_ThreadPool_NumThreads_Args, ctx);
SAME_FIELD(ThreadPoolNumThreads, num_threads, XLA_FFI_ThreadPool_NumThreads_Args, num_threads);

SAME_HEAD(Api, XLA_FFI_Api);
SAME_FIELD(Api, version, XLA_FFI_Api, api_version);
SAME_FIELD(Api, error_create, XLA_FFI_Api, XLA_FFI_Error_Create);
SAME_FIELD(Api, error_destroy, XLA_FFI_Api, XLA_FFI_Error_Destroy);
SAME_FIELD(Api, thread_pool_schedule, XLA_FFI_Api, XLA_FFI_ThreadPool_Schedule);
SAME_FIELD(Api, thread_pool_num_threads, XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads);
static_assert(sizeof(xla::Api) <= XLA_FFI_Api_STRUCT_SIZE);

// Parameters and results of these functions.
static_assert(std::is_same_v<XLA_FFI_Error_Create, XLA_FFI_Error*(XLA_FFI_Error_Create_Args*)>);
static_assert(std::is_same_v<XLA_FFI_Error_Destroy, void(XLA_FFI_Error_Destroy_Args*)>);
static_assert(std::is_same_v<XLA_FFI_ThreadPool_Schedule, XLA_FFI_Error*(XLA_FFI_ThreadPool_Schedule_Args*)>);
static_assert(std::is_same_v<XLA_FFI_ThreadPool_NumThreads, XLA_FFI_Error*(XLA_FFI_ThreadPool_NumThreads_Args*)>);
static_assert(std::is_same_v<XLA_FFI_Task, void(void*)>);
