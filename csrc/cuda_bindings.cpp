// Python meets the CUDA kernels here. Tensors arrive as addresses on the device with sizes, the stream as a
// number; launches return at once. The Python side has checked values, the checks here are those that need no
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "flash_attention/cuda.h"
#include "nt_xent/cuda.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void raise_failure(const std::string& op, const char* failure) {
  if (failure != nullptr) throw std::runtime_error(op + ": the CUDA launch failed: " + failure);
}

// Tensors (0: absent): query, key, value, cu_query, cu_key, order, first_tile, time_bias, times of the
// queries, times of the keys, output, lse, grad_output, delta, grad_query, grad_key, grad_value, bias_parts.
// Sizes: tiles at most, warps, sequences, heads, width, buckets.
void flash_attention(int pass, const std::vector<Address>& tensors, const std::vector<int64_t>& sizes,
                     int dtype, int64_t left, int64_t right, float scale, double dropout_p, uint64_t seed,
                     Address stream) {
  require(tensors.size() == 18 && sizes.size() == 6, "flash_attention: 18 tensors and 6 sizes must be given");
  require(dtype >= 0 && dtype <= 2, "flash_attention: dtype must be 0, 1 or 2, got " + std::to_string(dtype));
  const int vector = dtype == 0 ? 4 : 8;
  require(sizes[4] >= 1 && sizes[4] <= 256 && sizes[4] % vector == 0,
          "flash_attention: width must be a multiple of 16 bytes up to 256 numbers, got " +
              std::to_string(sizes[4]));
  for (const int at : {0, 1, 2, 10, 12, 14, 15, 16})
    require(tensors[at] % 16 == 0, "flash_attention: tensors must start at a multiple of 16 bytes");
  ubp::FlashAttentionDeviceProblem problem{};
  problem.query = pointer<void>(tensors[0]);
  problem.key = pointer<void>(tensors[1]);
  problem.value = pointer<void>(tensors[2]);
  problem.cu_query = pointer<int32_t>(tensors[3]);
  problem.cu_key = pointer<int32_t>(tensors[4]);
  problem.tiles = {pointer<int32_t>(tensors[5]), pointer<int32_t>(tensors[6]), sizes[0],
                   static_cast<int>(sizes[1])};
  problem.time_bias = pointer<float>(tensors[7]);
  problem.query_time_s = pointer<int64_t>(tensors[8]);
  problem.key_time_s = pointer<int64_t>(tensors[9]);
  problem.output = pointer<void>(tensors[10]);
  problem.lse = pointer<float>(tensors[11]);
  problem.grad_output = pointer<void>(tensors[12]);
  problem.delta = pointer<float>(tensors[13]);
  problem.grad_query = pointer<void>(tensors[14]);
  problem.grad_key = pointer<void>(tensors[15]);
  problem.grad_value = pointer<void>(tensors[16]);
  problem.bias_parts = pointer<float>(tensors[17]);
  problem.sequences = static_cast<int>(sizes[2]);
  problem.heads = static_cast<int>(sizes[3]);
  problem.width = static_cast<int>(sizes[4]);
  problem.buckets = static_cast<int>(sizes[5]);
  problem.dtype = static_cast<ubp::DType>(dtype);
  constexpr int64_t kFarthest = int64_t{1} << 32;  // so that no sum with a row overflows
  problem.left = std::clamp<int64_t>(left, -1, kFarthest);
  problem.right = std::clamp<int64_t>(right, -1, kFarthest);
  problem.scale = scale;
  problem.threshold = static_cast<uint32_t>(dropout_p * 4294967296.0);
  problem.keep_factor = static_cast<float>(1.0 / (1.0 - dropout_p));
  problem.seed = seed;
  require(pass >= 0 && pass <= 2, "flash_attention: pass must be 0, 1 or 2, got " + std::to_string(pass));
  const auto run = pass == 0   ? ubp::flash_attention_forward
                   : pass == 1 ? ubp::flash_attention_backward_queries
                               : ubp::flash_attention_backward_keys;
  raise_failure("flash_attention", run(problem, pointer<void>(stream)));
}

int flash_attention_warps(int pass, int dtype, int width, int buckets, int64_t rows) {
  return ubp::flash_attention_warps(static_cast<ubp::FlashAttentionPass>(pass),
                                    static_cast<ubp::DType>(dtype), width, buckets,
                                    static_cast<int>(std::min<int64_t>(rows, 1024)));
}

// Tensors (0: absent): own rows, other rows, scales, ids, positives, largest, sums, losses, weights, grad,
// moments. Sizes: own rows, other rows, numbers of the first of each, pairs, width, splits.
void nt_xent(int pass, const std::vector<Address>& tensors, const std::vector<int64_t>& sizes, int dtype,
             float inverse_temperature, Address stream) {
  require(tensors.size() == 11 && sizes.size() == 7, "nt_xent: 11 tensors and 7 sizes must be given");
  require(pass >= 0 && pass <= 2, "nt_xent: pass must be 0, 1 or 2, got " + std::to_string(pass));
  require(dtype >= 0 && dtype <= 2, "nt_xent: dtype must be 0, 1 or 2, got " + std::to_string(dtype));
  require(sizes[5] >= 64 && sizes[5] <= 2048 && sizes[5] % 64 == 0,
          "nt_xent: width must be a multiple of 64 up to 2048, got " + std::to_string(sizes[5]));
  require(tensors[0] % 16 == 0 && tensors[1] % 16 == 0 && tensors[9] % 16 == 0,
          "nt_xent: tensors must start at a multiple of 16 bytes");
  ubp::NTXentDeviceProblem problem{};
  problem.own = pointer<void>(tensors[0]);
  problem.other = pointer<void>(tensors[1]);
  problem.scales = pointer<float>(tensors[2]);
  problem.ids = pointer<int32_t>(tensors[3]);
  problem.positives = pointer<float>(tensors[4]);
  problem.largest = pointer<float>(tensors[5]);
  problem.sums = pointer<float>(tensors[6]);
  problem.losses = pointer<float>(tensors[7]);
  problem.weights = pointer<float>(tensors[8]);
  problem.grad = pointer<float>(tensors[9]);
  problem.moments = pointer<float>(tensors[10]);
  problem.own_rows = static_cast<int>(sizes[0]);
  problem.other_rows = static_cast<int>(sizes[1]);
  problem.own_first = static_cast<int>(sizes[2]);
  problem.other_first = static_cast<int>(sizes[3]);
  problem.pairs = static_cast<int>(sizes[4]);
  problem.width = static_cast<int>(sizes[5]);
  problem.splits = static_cast<int>(sizes[6]);
  problem.dtype = static_cast<ubp::DType>(dtype);
  problem.inverse_temperature = inverse_temperature;
  raise_failure("nt_xent", ubp::nt_xent(static_cast<ubp::NTXentPass>(pass), problem, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Compiled CUDA kernels of ubp_fast; use them through ubp_fast.kernels.";
  module.def("flash_attention", &flash_attention);
  module.def("nt_xent", &nt_xent);
  module.def("flash_attention_warps", &flash_attention_warps);
}
