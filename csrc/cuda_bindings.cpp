// Python meets the CUDA kernels here. A problem is a struct with the kernels' own field names; tensors arrive
// as addresses on the device, the stream as a number; launches return at once. The Python side has checked
// values, the checks here are those that need no device.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/bindings.h"
#include "flash_attention/cuda.h"
#include "nt_xent/cuda.h"

namespace py = pybind11;

namespace {

using ubp::Address;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void raise_failure(const std::string& op, const char* failure) {
  if (failure != nullptr) throw std::runtime_error(op + ": the CUDA launch failed: " + failure);
}

void require_aligned(const std::string& op, std::initializer_list<const void*> tensors) {
  for (const void* tensor : tensors)
    require(reinterpret_cast<Address>(tensor) % 16 == 0,
            op + ": tensors must start at a multiple of 16 bytes");
}

using ubp::Struct;
using Attention = ubp::FlashAttentionDeviceProblem;
using Contrastive = ubp::NTXentDeviceProblem;

void require_launchable(const std::string& op, int pass, ubp::DType dtype) {
  const int number = static_cast<int>(dtype);
  require(pass >= 0 && pass <= 2, op + ": pass must be 0, 1 or 2, got " + std::to_string(pass));
  require(number >= 0 && number <= 2, op + ": dtype must be 0, 1 or 2, got " + std::to_string(number));
}

void flash_attention(int pass, const Attention& problem, Address stream) {
  require_launchable("flash_attention", pass, problem.dtype);
  const int vector = problem.dtype == ubp::DType::kFloat32 ? 4 : 8;
  require(problem.width >= 1 && problem.width <= 256 && problem.width % vector == 0,
          "flash_attention: width must be a multiple of 16 bytes up to 256 numbers, got " +
              std::to_string(problem.width));
  require(problem.threshold == 0 || problem.seed != nullptr, "flash_attention: dropout needs a seed");
  require_aligned("flash_attention",
                  {problem.query, problem.key, problem.value, problem.output, problem.grad_output,
                   problem.grad_query, problem.grad_key, problem.grad_value});
  const auto run = pass == 0   ? ubp::flash_attention_forward
                   : pass == 1 ? ubp::flash_attention_backward_queries
                               : ubp::flash_attention_backward_keys;
  raise_failure("flash_attention", run(problem, reinterpret_cast<void*>(stream)));
}

int flash_attention_warps(int pass, int dtype, int width, int buckets, int64_t rows) {
  return ubp::flash_attention_warps(static_cast<ubp::FlashAttentionPass>(pass),
                                    static_cast<ubp::DType>(dtype), width, buckets,
                                    static_cast<int>(std::min<int64_t>(rows, 1024)));
}

void nt_xent(int pass, const Contrastive& problem, Address stream) {
  require_launchable("nt_xent", pass, problem.dtype);
  require(problem.width >= 64 && problem.width <= 2048 && problem.width % 64 == 0,
          "nt_xent: width must be a multiple of 64 up to 2048, got " + std::to_string(problem.width));
  require_aligned("nt_xent", {problem.own, problem.other, problem.grad});
  raise_failure("nt_xent",
                ubp::nt_xent(static_cast<ubp::NTXentPass>(pass), problem, reinterpret_cast<void*>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Compiled CUDA kernels of ubp_fast; use them through ubp_fast.kernels.";
  Struct<Attention>(module, "FlashAttentionProblem")
      .fields("query", &Attention::query, "key", &Attention::key, "value", &Attention::value, "cu_query",
              &Attention::cu_query, "cu_key", &Attention::cu_key, "order", &Attention::order, "first_tile",
              &Attention::first_tile, "bound", &Attention::bound, "warps", &Attention::warps, "sequences",
              &Attention::sequences, "heads", &Attention::heads, "width", &Attention::width, "dtype",
              &Attention::dtype, "left", &Attention::left, "right", &Attention::right, "scale",
              &Attention::scale, "time_bias", &Attention::time_bias, "query_time_s", &Attention::query_time_s,
              "key_time_s", &Attention::key_time_s, "buckets", &Attention::buckets, "threshold",
              &Attention::threshold, "keep_factor", &Attention::keep_factor, "seed", &Attention::seed,
              "output", &Attention::output, "lse", &Attention::lse, "grad_output", &Attention::grad_output,
              "delta", &Attention::delta, "grad_query", &Attention::grad_query, "grad_key",
              &Attention::grad_key, "grad_value", &Attention::grad_value, "bias_parts",
              &Attention::bias_parts);
  Struct<Contrastive>(module, "NTXentProblem")
      .fields("own", &Contrastive::own, "other", &Contrastive::other, "dtype", &Contrastive::dtype,
              "own_rows", &Contrastive::own_rows, "other_rows", &Contrastive::other_rows, "own_first",
              &Contrastive::own_first, "other_first", &Contrastive::other_first, "group", &Contrastive::group,
              "bias", &Contrastive::bias, "width", &Contrastive::width, "scales", &Contrastive::scales,
              "valid", &Contrastive::valid, "ids", &Contrastive::ids, "inverse_temperature",
              &Contrastive::inverse_temperature, "splits", &Contrastive::splits, "positives",
              &Contrastive::positives, "largest", &Contrastive::largest, "sums", &Contrastive::sums, "losses",
              &Contrastive::losses, "weights", &Contrastive::weights, "grad", &Contrastive::grad, "moments",
              &Contrastive::moments);
  module.def("flash_attention", &flash_attention);
  module.def("nt_xent", &nt_xent);
  module.def("flash_attention_warps", &flash_attention_warps);
}
