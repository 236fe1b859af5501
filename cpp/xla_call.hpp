// One call from XLA: its arguments, its errors and its threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "xla_abi.hpp"

namespace batchnorm::xla {

// Thrown and caught within one call. XLA receives the code and the message.
struct Failure {
  ErrorCode code;
  std::string message;
};

[[noreturn]] inline void refuse(const std::string& message) {
  throw Failure{ErrorCode::invalid_argument, "batchnorm: " + message};
}

inline Error* error_of(const Api& api, ErrorCode code, const char* message) {
  // The size ends with `code`, not with the struct: a later version may put a field into the padding at its end.
  ErrorCreate arguments{offsetof(ErrorCreate, code) + sizeof code, nullptr, message, code};
  return api.error_create(&arguments);
}

// Other sizes than these would mean other offsets of fields. Structs that can only grow at their end may be larger.
inline void check_layout(const CallFrame& frame) {
  const bool is_known = frame.struct_size >= sizeof frame && frame.args.struct_size == sizeof frame.args &&
                        frame.rets.struct_size == sizeof frame.rets && frame.attrs.struct_size == sizeof frame.attrs;
  const Api& api = *frame.api;
  if (is_known && api.version.major == major_version && api.struct_size >= sizeof api) return;
  refuse("compiled for version " + std::to_string(major_version) + "." + std::to_string(minor_version) +
         " of XLA's interface, and called by " + std::to_string(api.version.major) + "." +
         std::to_string(api.version.minor) + ", which lays out its calls in another way");
}

// The operands and attributes of one call. The constructor checks their layout and that their numbers are those of the
// target.
class CheckedCall {
 public:
  CheckedCall(const CallFrame& frame, int64_t args, int64_t rets, int64_t attrs) : frame_(frame) {
    check_layout(frame);
    if (frame.stage != Stage::execute) refuse("called in another stage than that of execution");
    check_number("operands", frame.args.size, args);
    check_number("results", frame.rets.size, rets);
    check_number("attributes", frame.attrs.size, attrs);
    for (int64_t i = 0; i < args; ++i) check_buffer(frame.args.types[i] == ArgType::buffer, arg(i));
    for (int64_t i = 0; i < rets; ++i) check_buffer(frame.rets.types[i] == RetType::buffer, ret(i));
  }

  const Buffer& arg(int64_t i) const { return *static_cast<const Buffer*>(frame_.args.args[i]); }
  const Buffer& ret(int64_t i) const { return *static_cast<const Buffer*>(frame_.rets.rets[i]); }

  double float64(const char* name) const { return *static_cast<const double*>(scalar(name, DataType::f64)); }
  int64_t int64(const char* name) const { return *static_cast<const int64_t*>(scalar(name, DataType::s64)); }
  bool boolean(const char* name) const { return *static_cast<const bool*>(scalar(name, DataType::pred)); }

 private:
  static void check_number(const char* what, int64_t number, int64_t expected) {
    if (number != expected)
      refuse("takes " + std::to_string(expected) + " " + what + ", not " + std::to_string(number) +
             "; was the program exported by another version?");
  }

  // Checked in this order, because only a buffer has a size to read.
  static void check_buffer(bool is_buffer, const Buffer& buffer) {
    if (!is_buffer || buffer.struct_size < sizeof buffer) refuse("an operand or a result is not an array");
  }

  const void* scalar(const char* name, DataType dtype) const {
    const Attrs& attrs = frame_.attrs;
    for (int64_t i = 0; i < attrs.size; ++i) {
      if (attrs.names[i]->size != std::strlen(name) || std::memcmp(attrs.names[i]->data, name, attrs.names[i]->size))
        continue;
      const auto* value = static_cast<const Scalar*>(attrs.attrs[i]);
      if (attrs.types[i] == AttrType::scalar && value->dtype == dtype) return value->value;
      refuse(std::string("the attribute ") + name + " has another type than it was declared with");
    }
    refuse(std::string("the attribute ") + name + " is absent");
  }

  const CallFrame& frame_;
};

// XLA's threads.
class ThreadPool {
 public:
  explicit ThreadPool(const CallFrame& frame) : api_(*frame.api), context_(frame.context) {}

  // The number of threads; 1 without a pool.
  int64_t size() const {
    int64_t threads = 1;
    ThreadPoolNumThreads arguments{sizeof arguments, nullptr, context_, &threads};
    if (discard(api_.thread_pool_num_threads(&arguments))) return 1;
    return std::max<int64_t>(threads, 1);
  }

  // Schedules the task, or runs it on this thread if the pool refuses it: a task that never runs would be waited for
  // forever.
  void schedule(void (*task)(void*), void* data) const {
    ThreadPoolSchedule arguments{sizeof arguments, nullptr, context_, task, data};
    if (discard(api_.thread_pool_schedule(&arguments))) task(data);
  }

 private:
  bool discard(Error* error) const {
    if (!error) return false;
    ErrorDestroy arguments{sizeof arguments, nullptr, error};
    api_.error_destroy(&arguments);
    return true;
  }

  const Api& api_;
  ExecutionContext* const context_;
};

}  // namespace batchnorm::xla
