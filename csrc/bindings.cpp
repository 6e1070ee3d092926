// The only file that knows Python. Tensors arrive as addresses with sizes; `api.py` has checked shapes and
// dtypes, the checks here keep a wrong caller from crashing the process. The GIL is released while a kernel
// runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dispatch.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("flash_attention: " + message);
}

// cu_seqlens must start at 0, never fall, and end at the number of tokens: indices come from it.
void check_offsets(const int32_t* offsets, int64_t sequences, int64_t tokens, const char* name) {
  require(offsets[0] == 0, std::string(name) + " must start at 0, got " + std::to_string(offsets[0]));
  for (int64_t at = 0; at < sequences; ++at)
    require(offsets[at + 1] >= offsets[at],
            std::string(name) + " must not decrease, got " + std::to_string(offsets[at]) + " then " +
                std::to_string(offsets[at + 1]) + " at entry " + std::to_string(at + 1));
  require(offsets[sequences] == tokens, std::string(name) + " must end at the number of tokens " +
                                            std::to_string(tokens) + ", got " +
                                            std::to_string(offsets[sequences]));
}

std::vector<int32_t> costly_first(const int32_t* cu_query, const int32_t* cu_key, int64_t sequences) {
  std::vector<int32_t> order(sequences);
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](int32_t b) {
    return int64_t{cu_query[b + 1] - cu_query[b]} * int64_t{cu_key[b + 1] - cu_key[b]};
  };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return cost(a) > cost(b); });
  return order;
}

struct Sizes {
  int64_t query_tokens, key_tokens, sequences, heads, width;
};

ubp::FlashAttentionProblem make_problem(Address query, Address key, Address value, Address cu_query,
                                        Address cu_key, const Sizes& sizes, int dtype, bool is_causal,
                                        float scale, int threads) {
  require(sizes.sequences >= 0 && sizes.heads >= 0 && sizes.query_tokens >= 0 && sizes.key_tokens >= 0,
          "sizes must not be negative");
  require(sizes.width >= 1 && sizes.width <= 256,
          "width must be in 1..256, got " + std::to_string(sizes.width));
  require(dtype >= 0 && dtype <= 2, "dtype must be 0, 1 or 2, got " + std::to_string(dtype));
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  ubp::FlashAttentionProblem problem{};
  problem.query = reinterpret_cast<const void*>(query);
  problem.key = reinterpret_cast<const void*>(key);
  problem.value = reinterpret_cast<const void*>(value);
  problem.cu_query = reinterpret_cast<const int32_t*>(cu_query);
  problem.cu_key = reinterpret_cast<const int32_t*>(cu_key);
  check_offsets(problem.cu_query, sizes.sequences, sizes.query_tokens, "cu_seqlens");
  check_offsets(problem.cu_key, sizes.sequences, sizes.key_tokens, "cu_seqlens_key");
  problem.sequences = sizes.sequences;
  problem.heads = sizes.heads;
  problem.width = sizes.width;
  problem.dtype = static_cast<ubp::DType>(dtype);
  problem.is_causal = is_causal;
  problem.scale = scale;
  problem.threads = threads;
  return problem;
}

void launch(ubp::FlashAttentionProblem& problem, ubp::FlashAttentionFunction function) {
  const std::vector<int32_t> order = costly_first(problem.cu_query, problem.cu_key, problem.sequences);
  problem.order = order.data();
  py::gil_scoped_release released;
  function(problem);
}

Sizes read_sizes(const std::vector<int64_t>& sizes) {
  require(sizes.size() == 5, "sizes must be (query tokens, key tokens, sequences, heads, width)");
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

void flash_attention_forward(Address query, Address key, Address value, Address cu_query, Address cu_key,
                             const std::vector<int64_t>& sizes, int dtype, bool is_causal, float scale,
                             int threads, Address output, Address lse) {
  ubp::FlashAttentionProblem problem =
      make_problem(query, key, value, cu_query, cu_key, read_sizes(sizes), dtype, is_causal, scale, threads);
  problem.output = reinterpret_cast<void*>(output);
  problem.lse = reinterpret_cast<float*>(lse);
  launch(problem, ubp::kernels().flash_attention_forward);
}

void flash_attention_backward(Address query, Address key, Address value, Address cu_query, Address cu_key,
                              const std::vector<int64_t>& sizes, int dtype, bool is_causal, float scale,
                              int threads, Address output, Address lse, Address grad_output,
                              Address grad_query, Address grad_key, Address grad_value) {
  ubp::FlashAttentionProblem problem =
      make_problem(query, key, value, cu_query, cu_key, read_sizes(sizes), dtype, is_causal, scale, threads);
  problem.output = reinterpret_cast<void*>(output);
  problem.lse = reinterpret_cast<float*>(lse);
  problem.grad_output = reinterpret_cast<const void*>(grad_output);
  problem.grad_query = reinterpret_cast<void*>(grad_query);
  problem.grad_key = reinterpret_cast<void*>(grad_key);
  problem.grad_value = reinterpret_cast<void*>(grad_value);
  launch(problem, ubp::kernels().flash_attention_backward);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled kernels of ubp_fast; use them through ubp_fast.kernels.";
  module.def("isa", [] { return std::string(ubp::kernels().isa); }, "Instruction set in use.");
  module.def("usable_isas", &ubp::usable_isas,
             "Instruction sets that this build has and this machine can run.");
  module.def("set_isa", &ubp::set_isa, py::arg("name"),
             "Uses another instruction set; ValueError when it cannot.");
  module.def("flash_attention_forward", &flash_attention_forward);
  module.def("flash_attention_backward", &flash_attention_backward);
}
