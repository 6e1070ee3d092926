// Python meets the kernels here (and in row_sparse/bindings.cpp). A problem is a struct with the kernels' own
// field names; `api.py` has checked shapes and dtypes, the checks here keep a wrong caller from crashing the
// process. The GIL is released while a kernel runs.
#include "common/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"

namespace py = pybind11;

namespace ubp {
void bind_row_sparse(py::module_& module);  // row_sparse/bindings.cpp
}

namespace {

using Attention = ubp::FlashAttentionProblem;
using Contrastive = ubp::NTXentProblem;

[[noreturn]] void refuse(const char* op, const std::string& message) {
  throw std::invalid_argument(std::string(op) + ": " + message);
}

void require_common(const char* op, ubp::DType dtype, int threads) {
  const int number = static_cast<int>(dtype);
  if (number < 0 || number > 2) refuse(op, "dtype must be 0, 1 or 2, got " + std::to_string(number));
  if (threads < 1) refuse(op, "threads must be >= 1, got " + std::to_string(threads));
}

constexpr const char *kAttention = "flash_attention", *kContrastive = "nt_xent", *kProduct = "row_product";

// Start at 0, never fall, and end at the number of tokens. Without a branch per entry.
template <class Offset>
bool are_offsets(const Offset* offsets, int64_t count, int64_t tokens) {
  if (count < 1 || offsets[0] != 0 || offsets[count - 1] != tokens) return false;
  unsigned falls = 0;
  for (int64_t at = 1; at < count; ++at) falls |= offsets[at] < offsets[at - 1];
  return falls == 0;
}

// cu_seqlens must start at 0, never fall, and end at the number of tokens: indices come from it.
void check_offsets(const int32_t* offsets, int64_t sequences, int64_t tokens, const char* name) {
  if (offsets == nullptr) refuse(kAttention, std::string(name) + " must be given");
  if (are_offsets(offsets, sequences + 1, tokens)) return;
  if (offsets[0] != 0)
    refuse(kAttention, std::string(name) + " must start at 0, got " + std::to_string(offsets[0]));
  for (int64_t at = 0; at < sequences; ++at)
    if (offsets[at + 1] < offsets[at])
      refuse(kAttention, std::string(name) + " must not decrease, got " + std::to_string(offsets[at]) +
                             " then " + std::to_string(offsets[at + 1]) + " at entry " +
                             std::to_string(at + 1));
  if (offsets[sequences] != tokens)
    refuse(kAttention, std::string(name) + " must end at the number of tokens " + std::to_string(tokens) +
                           ", got " + std::to_string(offsets[sequences]));
}

// Heads of a sequence stay together, as their rows do in memory, up to what the second-level cache holds, and
// unless the threads would run out of items. Items that take long come first, so that the threads end
// together, the others in the order of memory, in which the processor reads ahead.
std::vector<ubp::FlashAttentionItem> items_of(const Attention& problem) {
  constexpr int64_t kMostFloats = 66'000;  // of query and key
  constexpr int64_t kItemsPerThread = 8;
  constexpr double kLongShare = 1.0 / 64;  // of what one thread does
  const bool are_few = problem.threads > 1 && problem.sequences < problem.threads * kItemsPerThread;
  const auto length = [](const int32_t* offsets, int64_t b) { return int64_t{offsets[b + 1]} - offsets[b]; };
  const auto cost = [&](const ubp::FlashAttentionItem& item) {
    return length(problem.cu_query, item.sequence) * length(problem.cu_key, item.sequence) * item.heads;
  };
  std::vector<ubp::FlashAttentionItem> items;
  double total = 0;
  for (int64_t b = 0; b < problem.sequences; ++b) {
    const int64_t rows = length(problem.cu_query, b) + length(problem.cu_key, b);
    if (rows == 0) continue;
    const int64_t fitting = are_few ? 1 : kMostFloats / (rows * problem.width);
    const int64_t heads = std::min(std::max<int64_t>(fitting, 1), problem.heads);
    for (int64_t head = 0; head < problem.heads; head += heads) {
      items.push_back({static_cast<int32_t>(b), static_cast<int32_t>(head),
                       static_cast<int32_t>(std::min(heads, problem.heads - head))});
      total += static_cast<double>(cost(items.back()));
    }
  }
  if (problem.threads == 1) return items;
  const double long_cost = total * kLongShare / problem.threads;
  const auto rank = [&](const ubp::FlashAttentionItem& item) {
    const int64_t own = cost(item);
    return std::make_tuple(static_cast<double>(own) > long_cost ? -own : 0, item.sequence, item.first_head);
  };
  std::sort(items.begin(), items.end(),
            [&](const auto& one, const auto& other) { return rank(one) < rank(other); });
  return items;
}

template <ubp::FlashAttentionFunction ubp::Kernels::* kFunction>
void flash_attention(Attention problem) {
  require_common(kAttention, problem.dtype, problem.threads);
  for (const int64_t size : {problem.query_tokens, problem.key_tokens, problem.sequences, problem.heads})
    if (size < 0) refuse(kAttention, "sizes must not be negative");
  if (problem.width < 1 || problem.width > 256)
    refuse(kAttention, "width must be in 1..256, got " + std::to_string(problem.width));
  if (problem.time_bias != nullptr && (problem.buckets < 1 || problem.buckets > 106))
    refuse(kAttention, "buckets must be in 1..106, got " + std::to_string(problem.buckets));
  check_offsets(problem.cu_query, problem.sequences, problem.query_tokens, "cu_seqlens");
  check_offsets(problem.cu_key, problem.sequences, problem.key_tokens, "cu_seqlens_key");
  constexpr int64_t kFarthest = int64_t{1} << 32;  // so that no sum with a row overflows
  problem.left = std::clamp<int64_t>(problem.left, -1, kFarthest);
  problem.right = std::clamp<int64_t>(problem.right, -1, kFarthest);
  const std::vector<ubp::FlashAttentionItem> items = items_of(problem);
  problem.items = items.data();
  problem.item_count = static_cast<int64_t>(items.size());
  py::gil_scoped_release released;
  (ubp::kernels().*kFunction)(problem);
}

// Rows are read and written through `kept`, so its numbers must lie inside the tensors.
void check_kept(const int64_t* kept, const int32_t* ids, int64_t count, int64_t rows,
                const std::string& side) {
  if (count < 1 || count >= (int64_t{1} << 30) || count > rows)
    refuse(kContrastive,
           side + "_count must be in 1..2^30 - 1 and at most the rows, got " + std::to_string(count));
  int64_t previous = -1;
  for (int64_t at = 0; at < count; ++at) {
    if (kept[at] <= previous || kept[at] >= rows)
      refuse(kContrastive, side + "_kept must rise and stay below the number of rows, got " +
                               std::to_string(kept[at]) + " at entry " + std::to_string(at));
    if (ids[at] < 0)
      refuse(kContrastive,
             side + "_ids must be >= 0, got " + std::to_string(ids[at]) + " at entry " + std::to_string(at));
    previous = kept[at];
  }
}

template <ubp::NTXentFunction ubp::Kernels::* kFunction>
double nt_xent(Contrastive problem) {
  require_common(kContrastive, problem.dtype, problem.threads);
  const int form = static_cast<int>(problem.form);
  if (form < 0 || form > 2) refuse(kContrastive, "form must be 0, 1 or 2, got " + std::to_string(form));
  check_kept(problem.left_kept, problem.left_ids, problem.left_count, problem.left_rows, "left");
  check_kept(problem.right_kept, problem.right_ids, problem.right_count, problem.right_rows, "right");
  if (problem.positive == nullptr && (problem.left_count != problem.right_count || problem.places != nullptr))
    refuse(kContrastive, "left_count must be right_count, and places null, for matched rows");
  if (problem.positive != nullptr && (form != 0 || problem.places == nullptr))
    refuse(kContrastive, "positive must come with form 0 and places");
  for (int64_t row = 0; problem.places != nullptr && row < problem.left_count; ++row)
    if (problem.places[row] < -1 || problem.places[row] >= problem.right_count)
      refuse(kContrastive, "places must be in -1..right_count - 1, got " +
                               std::to_string(problem.places[row]) + " at entry " + std::to_string(row));
  if (problem.positive == nullptr || (problem.right_bias == nullptr) != (problem.positive_bias == nullptr))
    if (problem.right_bias != nullptr || problem.positive_bias != nullptr)
      refuse(kContrastive, "right_bias and positive_bias must both be there, with positive, or both be null");
  if (problem.width < 1 || problem.width > 2048)
    refuse(kContrastive, "width must be in 1..2048, got " + std::to_string(problem.width));
  if (!(problem.temperature > 0))
    refuse(kContrastive, "temperature must be > 0, got " + std::to_string(problem.temperature));
  double moment = 0;
  problem.moment = &moment;
  py::gil_scoped_release released;
  (ubp::kernels().*kFunction)(problem);
  return moment;
}

template <class Real, void (*ubp::RowProductKernels::*kFunction)(const ubp::RowProduct<Real>&)>
void row_product(const ubp::RowProduct<Real>& problem) {
  if (problem.count < 0 || problem.inputs < 0 || problem.outputs < 0)
    refuse(kProduct, "sizes must not be negative");
  py::gil_scoped_release released;
  (ubp::kernels().row_product.*kFunction)(problem);
}

// Scores are written where labels say.
void pair_network(const ubp::PairNetwork& problem) {
  if (problem.clients < 0 || problem.labels < 0 || problem.both < 0 || problem.width < 0 ||
      problem.first < 0 || problem.second < 0)
    refuse(kProduct, "sizes must not be negative");
  for (int64_t client = 0; client < problem.clients; ++client) {
    int64_t previous = -1;
    for (int64_t pair = problem.offsets[client]; pair < problem.offsets[client + 1]; ++pair) {
      if (problem.label[pair] <= previous || problem.label[pair] >= problem.labels)
        refuse(kProduct, "labels of a client must rise and stay below " + std::to_string(problem.labels) +
                             ", got " + std::to_string(problem.label[pair]) + " at pair " +
                             std::to_string(pair));
      previous = problem.label[pair];
    }
  }
  if (problem.first < 1) refuse(kProduct, "a network must have first units, got none");
  py::gil_scoped_release released;
  std::vector<float> units((2 * problem.first + problem.second) * ubp::kLabelsAtOnce);
  ubp::kernels().row_product.of_pairs(problem, units.data());
}

template <class Real>
void define_product(py::module_& module, const char* name) {
  using Product = ubp::RowProduct<Real>;
  ubp::Struct<Product>(module, name)
      .fields("rows", &Product::rows, "weight", &Product::weight, "bias", &Product::bias, "out",
              &Product::out, "count", &Product::count, "inputs", &Product::inputs, "outputs",
              &Product::outputs);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled kernels of ubp_fast; use them through ubp_fast.kernels.";
  module.def("isa", [] { return std::string(ubp::kernels().isa); }, "Instruction set in use.");
  module.def("usable_isas", &ubp::usable_isas,
             "Instruction sets that this build has and this machine can run.");
  module.def("set_isa", &ubp::set_isa, py::arg("name"),
             "Uses another instruction set; ValueError when it cannot.");
  module.def(
      "are_offsets",
      [](ubp::Address offsets, int64_t count, int item_bytes, int64_t tokens) {
        return item_bytes == 4 ? are_offsets(reinterpret_cast<const int32_t*>(offsets), count, tokens)
                               : are_offsets(reinterpret_cast<const int64_t*>(offsets), count, tokens);
      },
      "Whether they start at 0, never fall and end at `tokens`; of 4 or 8 bytes each.");
  ubp::Struct<Attention>(module, "FlashAttentionProblem")
      .fields("query", &Attention::query, "key", &Attention::key, "value", &Attention::value, "cu_query",
              &Attention::cu_query, "cu_key", &Attention::cu_key, "query_tokens", &Attention::query_tokens,
              "key_tokens", &Attention::key_tokens, "sequences", &Attention::sequences, "heads",
              &Attention::heads, "width", &Attention::width, "dtype", &Attention::dtype, "left",
              &Attention::left, "right", &Attention::right, "scale", &Attention::scale, "time_bias",
              &Attention::time_bias, "query_time_s", &Attention::query_time_s, "key_time_s",
              &Attention::key_time_s, "buckets", &Attention::buckets, "threshold", &Attention::threshold,
              "keep_factor", &Attention::keep_factor, "seed", &Attention::seed, "first_query_row",
              &Attention::first_query_row, "first_key_row", &Attention::first_key_row, "threads",
              &Attention::threads, "output", &Attention::output, "lse", &Attention::lse, "grad_output",
              &Attention::grad_output, "grad_query", &Attention::grad_query, "grad_key", &Attention::grad_key,
              "grad_value", &Attention::grad_value, "grad_time_bias", &Attention::grad_time_bias);
  module.def("flash_attention_forward", &flash_attention<&ubp::Kernels::flash_attention_forward>);
  module.def("flash_attention_backward", &flash_attention<&ubp::Kernels::flash_attention_backward>);
  ubp::Struct<Contrastive>(module, "NTXentProblem")
      .fields("left", &Contrastive::left, "right", &Contrastive::right, "positive", &Contrastive::positive,
              "dtype", &Contrastive::dtype, "left_kept", &Contrastive::left_kept, "right_kept",
              &Contrastive::right_kept, "left_ids", &Contrastive::left_ids, "right_ids",
              &Contrastive::right_ids, "left_rows", &Contrastive::left_rows, "right_rows",
              &Contrastive::right_rows, "left_count", &Contrastive::left_count, "right_count",
              &Contrastive::right_count, "width", &Contrastive::width, "form", &Contrastive::form, "has_ids",
              &Contrastive::has_ids, "places", &Contrastive::places, "right_bias", &Contrastive::right_bias,
              "positive_bias", &Contrastive::positive_bias, "is_normalized", &Contrastive::is_normalized,
              "temperature", &Contrastive::temperature, "threads", &Contrastive::threads, "losses",
              &Contrastive::losses, "weight", &Contrastive::weight, "shares", &Contrastive::shares, "factor",
              &Contrastive::factor, "grad_left", &Contrastive::grad_left, "grad_right",
              &Contrastive::grad_right, "grad_positive", &Contrastive::grad_positive);
  module.def("nt_xent_forward", &nt_xent<&ubp::Kernels::nt_xent_forward>);
  module.def("nt_xent_backward", &nt_xent<&ubp::Kernels::nt_xent_backward>,
             "Returns sum_i weight_i sum_j p_ij gap_ij, see nt_xent.h.");
  define_product<float>(module, "FloatProduct");
  define_product<double>(module, "DoubleProduct");
  module.def("row_product", &row_product<float, &ubp::RowProductKernels::of_floats>);
  module.def("row_product", &row_product<double, &ubp::RowProductKernels::of_doubles>);
  using Pairs = ubp::PairNetwork;
  ubp::Struct<Pairs>(module, "PairNetwork")
      .fields("of_client", &Pairs::of_client, "of_label", &Pairs::of_label, "of_both", &Pairs::of_both,
              "both_weight", &Pairs::both_weight, "both", &Pairs::both, "offsets", &Pairs::offsets, "label",
              &Pairs::label, "inputs", &Pairs::inputs, "input_weight", &Pairs::input_weight, "weight",
              &Pairs::weight, "bias", &Pairs::bias, "last_weight", &Pairs::last_weight, "last_bias",
              &Pairs::last_bias, "out", &Pairs::out, "clients", &Pairs::clients, "width", &Pairs::width,
              "labels", &Pairs::labels, "first", &Pairs::first, "second", &Pairs::second);
  module.def("pair_network", &pair_network);
  ubp::bind_row_sparse(module);
}
