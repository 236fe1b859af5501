// The extension module `batchnorm._native`: arrays are checked and viewed here, and nothing is computed.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "checks.hpp"
#include "memory.hpp"
#include "plain.hpp"
#include "xla.hpp"

namespace nb = nanobind;
using nb::handle;

namespace batchnorm {
namespace {

bool forward(handle x_, handle y_, handle gamma_, handle beta_, handle residual_, handle mean_, handle mean_lo_,
             handle m2_, handle rstd_, handle count_, handle keep_, handle lengths_, uint32_t kept, bool measure,
             double eps, uint8_t eps_placement, int correction, uint8_t activation, double slope,
             bool normalized_padding, int threads) {
  const Array x("x", x_), y("y", y_, true), gamma("gamma", gamma_), beta("beta", beta_), residual("residual", residual_);
  const Array mean("mean", mean_, measure), mean_lo("mean_lo", mean_lo_, measure), m2("m2", m2_, measure);
  const Array rstd("rstd", rstd_, measure), count("count", count_, measure), keep("mask", keep_), lengths("lengths", lengths_);
  if (eps_placement > static_cast<uint8_t>(EpsPlacement::absent)) throw nb::value_error("unknown placement of eps");
  if (y) check_like(y, x), check_writable(y), check_overlap(y, x, true);
  if (residual) check_like(residual, x), check_overlap(y, residual, true);
  Call call;
  Problem& problem = call.problem;
  call.add(x, problem.x);
  call.add(y, problem.y);
  call.add(residual, problem.residual);
  std::unique_ptr<int64_t[]> prefixes;
  if (!prepare(call, x, kept, keep, lengths, prefixes, threads)) return false;
  set_statistics(problem, mean, mean_lo, rstd);
  problem.count = integers(count, problem.C);
  problem.m2 = statistic(m2, problem.C, problem.dtype);
  if ((y || !measure) && !(mean && mean_lo && rstd)) throw nb::value_error("y needs mean, mean_lo and rstd");
  set_parameters(problem, gamma, beta, activation, slope);
  problem.measure = measure;
  problem.eps = eps;
  problem.eps_placement = static_cast<EpsPlacement>(eps_placement);
  problem.correction = correction;
  problem.normalized_padding = normalized_padding;
  return compute_unlocked(Operation::forward, problem);
}

bool backward(handle dy_, handle x_, handle dx_, handle gamma_, handle beta_, handle residual_, handle dgamma_,
              handle dbeta_, handle dresidual_, handle mean_, handle mean_lo_, handle rstd_, handle count_,
              handle factor_, handle keep_, handle lengths_, uint32_t kept, bool through_statistics,
              uint8_t activation, double slope, bool normalized_padding, int threads) {
  const Array x("x", x_), dy("dy", dy_), dx("dx", dx_, true), gamma("gamma", gamma_), beta("beta", beta_);
  const Array residual("residual", residual_), dgamma("dgamma", dgamma_, true), dbeta("dbeta", dbeta_, true);
  const Array dresidual("dresidual", dresidual_, true), mean("mean", mean_), mean_lo("mean_lo", mean_lo_);
  const Array rstd("rstd", rstd_), count("count", count_), factor("factor", factor_), keep("mask", keep_), lengths("lengths", lengths_);
  if (!dy) refuse(dy, "is needed");
  check_like(dy, x);
  for (const Array* array : {&residual, &dx, &dresidual})
    if (*array) check_like(*array, x);
  for (const Array* output : {&dx, &dresidual}) {
    check_writable(*output);
    for (const Array* input : {&x, &dy, &residual}) check_overlap(*output, *input, true);
  }
  check_overlap(dx, dresidual, false);
  Call call;
  Problem& problem = call.problem;
  call.add(x, problem.x);
  call.add(dy, problem.dy);
  call.add(residual, problem.residual);
  call.add(dx, problem.dx);
  call.add(dresidual, problem.dresidual);
  std::unique_ptr<int64_t[]> prefixes;
  if (!prepare(call, x, kept, keep, lengths, prefixes, threads)) return false;
  if (!(mean && mean_lo && rstd)) throw nb::value_error("backward needs mean, mean_lo and rstd");
  set_statistics(problem, mean, mean_lo, rstd);
  problem.count = integers(count, problem.C);
  set_parameters(problem, gamma, beta, activation, slope);
  problem.factor = channels(factor, problem.C);
  problem.dgamma = channels(dgamma, problem.C);
  problem.dbeta = channels(dbeta, problem.C);
  problem.measure = false;
  problem.through_statistics = through_statistics;
  problem.normalized_padding = normalized_padding;
  return compute_unlocked(Operation::backward, problem);
}

void make_averaging(Averaging* averaging, uint8_t tracked, uint8_t debias, int correction, bool corrects_tracked,
                    bool is_clamped, bool needs_two, bool is_cumulative, double momentum, double eps) {
  if (tracked > static_cast<uint8_t>(Tracked::log10_std) || debias > static_cast<uint8_t>(Debias::first_batch))
    throw nb::value_error("unknown tracked quantity or debias");
  new (averaging) Averaging{static_cast<Tracked>(tracked), static_cast<Debias>(debias), correction, corrects_tracked,
                            is_clamped, needs_two, is_cumulative, momentum, eps};
}

// The like of an array in memory of our own; None where its library has to allocate it.
nb::object result_like(handle array) {
  const nb::object result = own_like(array, Array("array", array));
  return result ? result : nb::none();
}

// A block of memory.hpp as an object with a buffer, for libraries that make arrays of one.
struct Block {
  int64_t bytes;
  void* data;

  explicit Block(int64_t bytes) : bytes(bytes), data(take_block(bytes)) {}
  ~Block() { give_back_block(data, bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

int get_buffer(PyObject* object, Py_buffer* view, int flags) {
  const Block* block = nb::inst_ptr<Block>(object);
  return PyBuffer_FillInfo(view, object, block->data, block->bytes, false, flags);
}

// How this was compiled and what it is limited to, for `show_config`.
nb::dict build_facts() {
  nb::dict facts;
#ifdef __clang__
  facts["compiler"] = "Clang " __clang_version__;
#else
  facts["compiler"] = "GCC " __VERSION__;
#endif
  facts["instruction_sets"] = nb::str(BATCHNORM_INSTRUCTION_SETS).attr("split")();
  facts["most_waiting_bytes"] = most_waiting;
  facts["longest_wait_seconds"] = longest_wait;
  return facts;
}

PyType_Slot block_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)}, {0, nullptr}};

}  // namespace
}  // namespace batchnorm

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // caches hold `Averaging` objects until the interpreter ends
  using namespace batchnorm;
  m.doc() = "Batch normalization kernels on CPU arrays. Private: `batchnorm.kernels.native` is its only caller.";
  choose_kernels(nullptr);
  const auto optional = [](const char* name) { return nb::arg(name).none(); };
  m.def("forward", &forward, nb::arg("x"), optional("y"), optional("gamma"), optional("beta"), optional("residual"),
        optional("mean"), optional("mean_lo"), optional("m2"), optional("rstd"), optional("count"), optional("mask"),
        optional("lengths"), nb::arg("kept"), nb::arg("measure"), nb::arg("eps"), nb::arg("eps_placement"),
        nb::arg("correction"), nb::arg("activation"), nb::arg("slope"), nb::arg("normalized_padding"),
        nb::arg("threads"));
  m.def("backward", &backward, nb::arg("dy"), nb::arg("x"), optional("dx"), optional("gamma"), optional("beta"),
        optional("residual"), optional("dgamma"), optional("dbeta"), optional("dresidual"), nb::arg("mean"),
        nb::arg("mean_lo"), nb::arg("rstd"), optional("count"), optional("factor"), optional("mask"),
        optional("lengths"), nb::arg("kept"), nb::arg("through_statistics"), nb::arg("activation"), nb::arg("slope"),
        nb::arg("normalized_padding"), nb::arg("threads"));
  nb::class_<Averaging>(m, "Averaging")
      .def("__init__", &make_averaging, nb::arg("tracked"), nb::arg("debias"), nb::arg("correction"),
           nb::arg("corrects_tracked"), nb::arg("is_clamped"), nb::arg("needs_two"), nb::arg("is_cumulative"),
           nb::arg("momentum"), nb::arg("eps"));
  m.def("forward_plain", &forward_plain, nb::arg("x"), optional("gamma"), optional("beta"), optional("residual"), optional("out"),
        nb::arg("axis"), nb::arg("eps"), nb::arg("activation"), nb::arg("slope"), nb::arg("threads"),
        nb::arg("empty_like"), optional("statistic_like"), optional("count_like"), optional("running_mean"),
        optional("running_spread"), optional("steps"), optional("weight"), nb::arg("averaging").none(), nb::arg("in_table"),
        nb::arg("has_output") = true);
  m.def("inference_plain", &inference_plain, nb::arg("x"), optional("gamma"), optional("beta"), optional("residual"),
        nb::arg("mean"), nb::arg("var"), nb::arg("axis"), nb::arg("eps"), nb::arg("eps_placement"),
        nb::arg("activation"), nb::arg("slope"), nb::arg("threads"), nb::arg("empty_like"),
        nb::arg("keeps_statistics"), nb::arg("has_output") = true);
  m.def("backward_plain", &backward_plain, nb::arg("dy"), nb::arg("x"), optional("gamma"), optional("beta"),
        optional("residual"), nb::arg("statistics"), optional("count"), nb::arg("kept"), nb::arg("activation"),
        nb::arg("slope"), nb::arg("threads"), nb::arg("empty_like"), nb::arg("has_dx"),
        nb::arg("through_statistics"));
  nb::class_<Block>(m, "Block", nb::type_slots(block_slots)).def(nb::init<int64_t>(), nb::arg("bytes"));
  m.attr("smallest_block") = smallest_block;
  m.def("result_like", &result_like);
  m.def("waiting_bytes", &waiting_bytes);
  m.def("release_blocks", &release_blocks);
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
  m.def("instruction_set", [] { return chosen_kernels().name; });
  m.def("set_instruction_set", &choose_kernels);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported_kernels()) names.push_back(kernels->name);
    return names;
  });
}
