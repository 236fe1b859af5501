// The extension module `batchnorm._native`: names and types.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "caches.hpp"
#include "call.hpp"
#include "dispatch.hpp"
#include "memory.hpp"
#include "xla.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

// Converts a number from Python to an enumeration; throws ValueError if it is negative or greater than the last member.
template <class Enum> Enum to_enum(int64_t number, Enum last) {
  if (number < 0 || number > static_cast<int64_t>(last)) throw nb::value_error("no such member of an enumeration");
  return static_cast<Enum>(number);
}

void make_averaging(Averaging* averaging, int64_t tracked, int64_t debias, int correction, bool corrects_tracked,
                    bool is_clamped, bool needs_two, bool is_cumulative, double momentum, double eps) {
  new (averaging) Averaging{to_enum(tracked, Tracked::log10_std),
                            to_enum(debias, Debias::first_batch),
                            correction,
                            corrects_tracked,
                            is_clamped,
                            needs_two,
                            is_cumulative,
                            momentum,
                            eps};
}

void make_spec(Spec* spec, uint32_t channel_axes, int64_t group_size, int64_t activation, double slope, double eps,
               int64_t eps_train, int64_t eps_eval, bool refuses_zero_eps, int correction, int64_t affine,
               bool normalized_padding, bool normalizes_by_running, bool always_updates, int64_t single,
               bool refuses_masked_single, const Averaging& averaging, const Averaging& masked_averaging) {
  if (group_size < 0) throw nb::value_error("group_size must not be negative");
  new (spec) Spec{channel_axes,
                  group_size,
                  to_enum(activation, Activation::hardswish),
                  slope,
                  eps,
                  to_enum(eps_train, EpsPlacement::absent),
                  to_enum(eps_eval, EpsPlacement::absent),
                  refuses_zero_eps,
                  correction,
                  to_enum(affine, Affine::gamma_one),
                  normalized_padding,
                  normalizes_by_running,
                  always_updates,
                  to_enum(single, Single::running),
                  refuses_masked_single,
                  averaging,
                  masked_averaging};
}

void make_request(Request* request, int64_t source, bool is_in_place, int64_t returns) {
  new (request) Request{to_enum(source, Source::given), is_in_place, to_enum(returns, Returns::table_alone)};
}

// An uninitialized array like `array` in the extension's memory; None if its library has to allocate it.
nb::object pooled_like(handle array) {
  const nb::object result = allocate_like(array, Array(array));
  return result ? result : nb::none();
}

// A buffer of the pool as a Python object with a buffer, from which libraries can create arrays.
struct PooledBuffer {
  int64_t bytes;
  void* data;

  explicit PooledBuffer(int64_t bytes) : bytes(bytes), data(allocate_pooled(bytes)) {}
  ~PooledBuffer() { deallocate_pooled(data, bytes); }
  PooledBuffer(const PooledBuffer&) = delete;
  PooledBuffer& operator=(const PooledBuffer&) = delete;
};

int get_buffer(PyObject* object, Py_buffer* view, int flags) {
  const PooledBuffer* buffer = nb::inst_ptr<PooledBuffer>(object);
  return PyBuffer_FillInfo(view, object, buffer->data, buffer->bytes, false, flags);
}

// Compiler, instruction sets and limits, for `show_config`.
nb::dict build_facts() {
  nb::dict facts;
#ifdef __clang__
  facts["compiler"] = "Clang " __clang_version__;
#else
  facts["compiler"] = "GCC " __VERSION__;
#endif
  facts["instruction_sets"] = nb::str(BATCHNORM_INSTRUCTION_SETS).attr("split")();
  facts["max_cached_bytes"] = max_cached_bytes;
  facts["max_idle_seconds"] = max_idle_seconds;
  return facts;
}

PyType_Slot pooled_buffer_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)}, {0, nullptr}};

}  // namespace
}  // namespace batchnorm

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // caches hold `Averaging` objects until the interpreter exits
  using namespace batchnorm;
  m.doc() = "Batch normalization kernels on CPU arrays. Private: `batchnorm.kernels.native` is its only caller.";
  choose_kernels(nullptr);
  const auto optional = [](const char* name) { return nb::arg(name).none(); };
  nb::enum_<Refusal>(m, "Refusal")
      .value("type", Refusal::type)
      .value("dtype", Refusal::dtype)
      .value("shape", Refusal::shape)
      .value("strides", Refusal::strides)
      .value("state", Refusal::state)
      .value("single", Refusal::single)
      .value("eps", Refusal::eps)
      .value("output", Refusal::output);
  nb::class_<Library>(m, "Library")
      .def(nb::init<nb::tuple, nb::object, nb::object, nb::object>(), nb::arg("types"), nb::arg("empty_like"),
           nb::arg("pooled_like"), nb::arg("empty"));
  nb::class_<Averaging>(m, "Averaging")
      .def("__init__", &make_averaging, nb::arg("tracked"), nb::arg("debias"), nb::arg("correction"),
           nb::arg("corrects_tracked"), nb::arg("is_clamped"), nb::arg("needs_two"), nb::arg("is_cumulative"),
           nb::arg("momentum"), nb::arg("eps"));
  nb::class_<Spec>(m, "Spec").def(
      "__init__", &make_spec, nb::arg("channel_axes"), nb::arg("group_size"), nb::arg("activation"), nb::arg("slope"),
      nb::arg("eps"), nb::arg("eps_train"), nb::arg("eps_eval"), nb::arg("refuses_zero_eps"), nb::arg("correction"),
      nb::arg("affine"), nb::arg("normalized_padding"), nb::arg("normalizes_by_running"), nb::arg("always_updates"),
      nb::arg("single"), nb::arg("refuses_masked_single"), nb::arg("averaging"), nb::arg("masked_averaging"));
  nb::class_<Request>(m, "Request")
      .def("__init__", &make_request, nb::arg("source"), nb::arg("is_in_place"), nb::arg("returns"));
  m.def("normalize", &normalize, nb::arg("library"), nb::arg("request"), nb::arg("spec"), nb::arg("operands"),
        optional("numbers"), optional("out"), nb::arg("threads"));
  m.def("gradients", &gradients, nb::arg("library"), nb::arg("spec"), nb::arg("dy"), nb::arg("operands"),
        nb::arg("statistics"), optional("count"), nb::arg("through_statistics"), nb::arg("has_dx"), nb::arg("threads"));
  nb::class_<PooledBuffer>(m, "PooledBuffer", nb::type_slots(pooled_buffer_slots))
      .def(nb::init<int64_t>(), nb::arg("bytes"));
  m.attr("min_pooled_bytes") = min_pooled_bytes;
  m.def("pooled_like", &pooled_like);
  m.def("cached_bytes", &cached_bytes);
  m.def("release_cached", &release_cached);
  m.def("xla_targets", [] {
    nb::dict targets;
    targets["batchnorm_forward"] = nb::capsule(reinterpret_cast<void*>(xla_forward));
    targets["batchnorm_backward"] = nb::capsule(reinterpret_cast<void*>(xla_backward));
    targets["batchnorm_advance"] = nb::capsule(reinterpret_cast<void*>(xla_advance));
    return targets;
  });
  m.attr("build") = build_facts();
  m.attr("xla_version") = nb::make_tuple(xla::major_version, xla::minor_version);
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads);
  m.def("caches", [] {
    const Caches sizes = caches();
    return nb::make_tuple(sizes.l2, sizes.l3);
  });
  m.def("set_caches", [](int64_t l2, int64_t l3) { set_caches({l2, l3}); }, nb::arg("l2"), nb::arg("l3"));
  m.def("instruction_set", [] { return chosen_kernels().name; });
  m.def("set_instruction_set", &choose_kernels);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_kernels()) names.push_back(kernels->name);
    return names;
  });
}
