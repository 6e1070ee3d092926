// Python meets the kernels here (and in row_sparse/bindings.cpp). Tensors arrive as addresses with sizes; `api.py` has checked shapes and
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
#include "row_sparse/bindings.h"

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

void require_nt_xent(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("nt_xent: " + message);
}

// Rows are read and written through `kept`, so its numbers must lie inside the tensors.
ubp::NTXentProblem make_nt_xent(Address left, Address right, Address kept, Address ids,
                                const std::vector<int64_t>& sizes, int dtype, int form, bool has_ids,
                                bool is_normalized, double temperature, int threads, Address losses) {
  require_nt_xent(sizes.size() == 3, "sizes must be (rows, pairs, width)");
  require_nt_xent(sizes[1] >= 1 && sizes[1] < (int64_t{1} << 30) && sizes[1] <= sizes[0],
                  "pairs must be in 1..2^30 - 1 and at most the rows, got " + std::to_string(sizes[1]));
  require_nt_xent(sizes[2] >= 1 && sizes[2] <= 2048,
                  "width must be in 1..2048, got " + std::to_string(sizes[2]));
  require_nt_xent(dtype >= 0 && dtype <= 2, "dtype must be 0, 1 or 2, got " + std::to_string(dtype));
  require_nt_xent(form >= 0 && form <= 2, "form must be 0, 1 or 2, got " + std::to_string(form));
  require_nt_xent(temperature > 0, "temperature must be > 0, got " + std::to_string(temperature));
  require_nt_xent(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  ubp::NTXentProblem problem{};
  problem.left = reinterpret_cast<const void*>(left);
  problem.right = reinterpret_cast<const void*>(right);
  problem.kept = reinterpret_cast<const int64_t*>(kept);
  problem.ids = reinterpret_cast<const int32_t*>(ids);
  problem.pairs = sizes[1];
  problem.width = sizes[2];
  problem.dtype = static_cast<ubp::DType>(dtype);
  problem.form = static_cast<ubp::NTXentForm>(form);
  problem.has_ids = has_ids;
  problem.is_normalized = is_normalized;
  problem.temperature = temperature;
  problem.threads = threads;
  problem.losses = reinterpret_cast<double*>(losses);
  int64_t previous = -1;
  for (int64_t pair = 0; pair < problem.pairs; ++pair) {
    require_nt_xent(problem.kept[pair] > previous && problem.kept[pair] < sizes[0],
                    "kept must rise and stay below the number of rows, got " +
                        std::to_string(problem.kept[pair]) + " at entry " + std::to_string(pair));
    require_nt_xent(problem.ids[pair] >= 0, "ids must be >= 0, got " + std::to_string(problem.ids[pair]) +
                                                " at entry " + std::to_string(pair));
    previous = problem.kept[pair];
  }
  return problem;
}

void nt_xent_forward(Address left, Address right, Address kept, Address ids,
                     const std::vector<int64_t>& sizes, int dtype, int form, bool has_ids, bool is_normalized,
                     double temperature, int threads, Address losses) {
  const ubp::NTXentProblem problem = make_nt_xent(left, right, kept, ids, sizes, dtype, form, has_ids,
                                                  is_normalized, temperature, threads, losses);
  py::gil_scoped_release released;
  ubp::kernels().nt_xent_forward(problem);
}

double nt_xent_backward(Address left, Address right, Address kept, Address ids,
                        const std::vector<int64_t>& sizes, int dtype, int form, bool has_ids,
                        bool is_normalized, double temperature, int threads, Address losses, Address weight,
                        double factor, Address grad_left, Address grad_right) {
  ubp::NTXentProblem problem = make_nt_xent(left, right, kept, ids, sizes, dtype, form, has_ids,
                                            is_normalized, temperature, threads, losses);
  double moment = 0;
  problem.weight = reinterpret_cast<const float*>(weight);
  problem.factor = factor;
  problem.grad_left = reinterpret_cast<void*>(grad_left);
  problem.grad_right = reinterpret_cast<void*>(grad_right);
  problem.moment = &moment;
  py::gil_scoped_release released;
  ubp::kernels().nt_xent_backward(problem);
  return moment;
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
  module.def("nt_xent_forward", &nt_xent_forward);
  module.def("nt_xent_backward", &nt_xent_backward);
  ubp::bind_row_sparse(module);
}
