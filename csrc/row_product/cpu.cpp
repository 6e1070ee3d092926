#include "common/gemm.h"
#include "row_product/row_product.h"

namespace ubp {
namespace {

// A strip of sums this high, the inputs of its rows and a part of the weights lie in the fastest cache.
constexpr int64_t kRowsAtOnce = 16 * kRegisterRows;
constexpr int64_t kSteps = 32;  // summed one after the other; sums of many steps are sums of such sums

// C [m, n] = or += A [m, k] B [k, n], part by part of k >= 1; n must be a multiple of the lanes.
template <class A>
void multiply_parts(typename A::Real* c, int64_t c_stride, Operand<A> a, Operand<A> b, int64_t m, int64_t n,
                    int64_t k, bool adds) {
  for (int64_t step = 0; step < k; step += kSteps)
    multiply<A, false>(c, c_stride, {a.data + step, a.stride}, {b.data + step * b.stride, b.stride}, m, n,
                       smaller(kSteps, k - step), adds || step > 0);
}

template <class A>
void product(const RowProduct<typename A::Real>& problem) {
  using Real = typename A::Real;
  constexpr int64_t kColumns = kRegisterColumns * A::kLanes;
  alignas(64) Real sums[kRowsAtOnce * kColumns], part[kSteps * kColumns] = {};
  for (int64_t first = 0; first < problem.count; first += kRowsAtOnce) {
    const int64_t rows = smaller(kRowsAtOnce, problem.count - first);
    for (int64_t column = 0; column < problem.outputs; column += kColumns) {
      const int64_t width = smaller(kColumns, problem.outputs - column), padded = round_up(width, A::kLanes);
      Real beginning[kColumns] = {};
      if (problem.bias != nullptr) std::memcpy(beginning, problem.bias + column, width * sizeof(Real));
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(sums + row * kColumns, beginning, sizeof(beginning));
      const Operand<A> left{problem.rows + first * problem.inputs, problem.inputs};
      const Operand<A> right{problem.weight + column, problem.outputs};
      if (padded == width) {
        multiply_parts<A>(sums, kColumns, left, right, rows, width, problem.inputs, true);
      } else {
        for (int64_t step = 0; step < problem.inputs; step += kSteps) {
          const int64_t steps = smaller(kSteps, problem.inputs - step);
          for (int64_t row = 0; row < steps; ++row)
            std::memcpy(part + row * kColumns, right.data + (step + row) * right.stride,
                        width * sizeof(Real));
          multiply_parts<A>(sums, kColumns, {left.data + step, left.stride}, {part, kColumns}, rows, padded,
                            steps, true);
        }
      }
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(problem.out + (first + row) * problem.outputs + column, sums + row * kColumns,
                    width * sizeof(Real));
    }
  }
}

UBP_INLINE float rectified(float value) { return value > 0.f ? value : 0.f; }

// First units of a client and of labels from `start` on, and those of the pairs of which more is known.
void first_units(const PairNetwork& problem, int64_t client, int64_t start, int64_t width, int64_t pair,
                 int64_t end, float* units, float* known) {
  const float* of_client = problem.of_client + client * problem.first;
  const float* of_both = problem.of_both + client * problem.both * problem.labels;
  for (int64_t unit = 0; unit < problem.first; ++unit) {
    const float* of_label = problem.of_label + unit * problem.labels + start;
    float* __restrict target = units + unit * kLabelsAtOnce;
    for (int64_t at = 0; at < width; ++at) target[at] = of_client[unit] + of_label[at];
    for (int64_t both = 0; both < problem.both; ++both) {
      const float weight = problem.both_weight[both * problem.first + unit];
      const float* values = of_both + both * problem.labels + start;
      for (int64_t at = 0; at < width; ++at) target[at] += weight * values[at];
    }
  }
  if (pair < end)
    product<FloatArithmetic>({problem.inputs + pair * problem.width, problem.input_weight, nullptr, known,
                              end - pair, problem.width, problem.first});
  for (; pair < end; ++pair, known += problem.first)
    for (int64_t unit = 0; unit < problem.first; ++unit)
      units[unit * kLabelsAtOnce + problem.label[pair] - start] += known[unit];
  for (int64_t unit = 0; unit < problem.first; ++unit)
    for (int64_t at = 0; at < width; ++at)
      units[unit * kLabelsAtOnce + at] = rectified(units[unit * kLabelsAtOnce + at]);
}

void network(const PairNetwork& problem, float* units) {
  float *const first = units, *const second = first + problem.first * kLabelsAtOnce;
  float* const known = second + problem.second * kLabelsAtOnce;
  for (int64_t client = 0; client < problem.clients; ++client) {
    int64_t pair = problem.offsets[client];
    for (int64_t start = 0; start < problem.labels; start += kLabelsAtOnce) {
      const int64_t width = smaller(kLabelsAtOnce, problem.labels - start), padded = round_up(width, kWidth);
      int64_t end = pair;
      while (end < problem.offsets[client + 1] && problem.label[end] < start + width) ++end;
      first_units(problem, client, start, width, pair, end, first, known);
      pair = end;
      // Columns behind the width hold what was there before; nothing of them reaches the others.
      multiply_parts<FloatArithmetic>(second, kLabelsAtOnce, {problem.weight, problem.first},
                                      {first, kLabelsAtOnce}, problem.second, padded, problem.first, false);
      for (int64_t at = 0; at < padded; at += kWidth) {
        Vec sum = broadcast(*problem.last_bias);
        for (int64_t unit = 0; unit < problem.second; ++unit)
          sum = sum + maximum(load(second + unit * kLabelsAtOnce + at) + problem.bias[unit], Vec{}) *
                          problem.last_weight[unit];
        std::memcpy(problem.out + client * problem.labels + start + at, &sum,
                    smaller(kWidth, width - at) * sizeof(float));
      }
    }
  }
}

}  // namespace

namespace UBP_ISA_NAMESPACE {

RowProductKernels row_product() { return {&product<FloatArithmetic>, &product<DoubleArithmetic>, &network}; }

}  // namespace UBP_ISA_NAMESPACE
}  // namespace ubp
