// Python meets the kernels here (and in row_sparse/bindings.cpp). Tensors arrive as addresses with sizes;
// `api.py` has checked shapes and dtypes, the checks here keep a wrong caller from crashing the process. The
// GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dispatch.h"

namespace py = pybind11;

namespace ubp {
void bind_row_sparse(py::module_& module);  // row_sparse/bindings.cpp
}

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

// Heads of a sequence stay together, as their rows do in memory, up to what the second-level cache holds, and
// unless the threads would run out of items.
std::vector<ubp::FlashAttentionItem> costly_first(const ubp::FlashAttentionProblem& problem) {
  constexpr int64_t kCacheFloats = 200'000, kCopies = 6, kItemsPerThread = 8;
  const bool are_few = problem.threads > 1 && problem.sequences < problem.threads * kItemsPerThread;
  const auto length = [](const int32_t* offsets, int64_t b) { return int64_t{offsets[b + 1]} - offsets[b]; };
  std::vector<ubp::FlashAttentionItem> items;
  for (int64_t b = 0; b < problem.sequences; ++b) {
    const int64_t rows = length(problem.cu_query, b) + length(problem.cu_key, b);
    if (rows == 0) continue;
    const int64_t fitting = are_few ? 1 : kCacheFloats / (kCopies * rows * problem.width);
    const int64_t heads = std::min(std::max<int64_t>(fitting, 1), problem.heads);
    for (int64_t head = 0; head < problem.heads; head += heads)
      items.push_back({static_cast<int32_t>(b), static_cast<int32_t>(head),
                       static_cast<int32_t>(std::min(heads, problem.heads - head))});
  }
  const auto cost = [&](const ubp::FlashAttentionItem& item) {
    return length(problem.cu_query, item.sequence) * length(problem.cu_key, item.sequence) * item.heads;
  };
  std::stable_sort(items.begin(), items.end(),
                   [&](const auto& one, const auto& other) { return cost(one) > cost(other); });
  return items;
}

// What Python hands over: addresses (0: absent) of query, key, value, cu_query, cu_key, time_bias, times of
// the queries, times of the keys; sizes (query tokens, key tokens, sequences, heads, width, buckets).
struct Call {
  const std::vector<Address>& tensors;
  const std::vector<int64_t>& sizes;
};

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

ubp::FlashAttentionProblem make_problem(const Call& call) {
  require(call.tensors.size() == 8, "tensors must be eight addresses");
  require(call.sizes.size() == 6,
          "sizes must be (query tokens, key tokens, sequences, heads, width, buckets)");
  for (const int64_t size : call.sizes) require(size >= 0, "sizes must not be negative");
  ubp::FlashAttentionProblem problem{};
  problem.query = pointer<const void>(call.tensors[0]);
  problem.key = pointer<const void>(call.tensors[1]);
  problem.value = pointer<const void>(call.tensors[2]);
  problem.cu_query = pointer<const int32_t>(call.tensors[3]);
  problem.cu_key = pointer<const int32_t>(call.tensors[4]);
  problem.time_bias = pointer<const float>(call.tensors[5]);
  problem.query_time_s = pointer<const int64_t>(call.tensors[6]);
  problem.key_time_s = pointer<const int64_t>(call.tensors[7]);
  problem.sequences = call.sizes[2];
  problem.heads = call.sizes[3];
  problem.width = call.sizes[4];
  problem.buckets = call.sizes[5];
  require(problem.width >= 1 && problem.width <= 256,
          "width must be in 1..256, got " + std::to_string(problem.width));
  if (problem.time_bias != nullptr)
    require(problem.buckets >= 1 && problem.buckets <= 106,
            "buckets must be in 1..106, got " + std::to_string(problem.buckets));
  check_offsets(problem.cu_query, problem.sequences, call.sizes[0], "cu_seqlens");
  check_offsets(problem.cu_key, problem.sequences, call.sizes[1], "cu_seqlens_key");
  return problem;
}

void set_options(ubp::FlashAttentionProblem& problem, int dtype, int64_t left, int64_t right, float scale,
                 double dropout_p, uint64_t seed, int threads) {
  require(dtype >= 0 && dtype <= 2, "dtype must be 0, 1 or 2, got " + std::to_string(dtype));
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
  require(dropout_p >= 0.0 && dropout_p < 1.0,
          "dropout_p must be in [0, 1), got " + std::to_string(dropout_p));
  constexpr int64_t kFarthest = int64_t{1} << 32;  // so that no sum with a row overflows
  problem.dtype = static_cast<ubp::DType>(dtype);
  problem.left = std::clamp<int64_t>(left, -1, kFarthest);
  problem.right = std::clamp<int64_t>(right, -1, kFarthest);
  problem.scale = scale;
  problem.threshold = static_cast<uint32_t>(dropout_p * 4294967296.0);
  problem.keep_factor = static_cast<float>(1.0 / (1.0 - dropout_p));
  problem.seed = seed;
  problem.threads = threads;
}

void launch(ubp::FlashAttentionProblem& problem, ubp::FlashAttentionFunction function) {
  const std::vector<ubp::FlashAttentionItem> items = costly_first(problem);
  problem.items = items.data();
  problem.item_count = static_cast<int64_t>(items.size());
  py::gil_scoped_release released;
  function(problem);
}

// Results: output, lse.
void flash_attention_forward(const std::vector<Address>& tensors, const std::vector<int64_t>& sizes,
                             int dtype, int64_t left, int64_t right, float scale, double dropout_p,
                             uint64_t seed, int threads, const std::vector<Address>& results) {
  ubp::FlashAttentionProblem problem = make_problem({tensors, sizes});
  set_options(problem, dtype, left, right, scale, dropout_p, seed, threads);
  require(results.size() == 2, "results must be two addresses");
  problem.output = pointer<void>(results[0]);
  problem.lse = pointer<float>(results[1]);
  launch(problem, ubp::kernels().flash_attention_forward);
}

// Results: output, lse and grad_output, which are read; the gradients of query, key, value and time_bias.
void flash_attention_backward(const std::vector<Address>& tensors, const std::vector<int64_t>& sizes,
                              int dtype, int64_t left, int64_t right, float scale, double dropout_p,
                              uint64_t seed, int threads, const std::vector<Address>& results) {
  ubp::FlashAttentionProblem problem = make_problem({tensors, sizes});
  set_options(problem, dtype, left, right, scale, dropout_p, seed, threads);
  require(results.size() == 7, "results must be seven addresses");
  problem.output = pointer<void>(results[0]);
  problem.lse = pointer<float>(results[1]);
  problem.grad_output = pointer<const void>(results[2]);
  problem.grad_query = pointer<void>(results[3]);
  problem.grad_key = pointer<void>(results[4]);
  problem.grad_value = pointer<void>(results[5]);
  problem.grad_time_bias = pointer<float>(results[6]);
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
