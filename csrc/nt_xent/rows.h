// What belongs to single rows: reading and normalising them, the layouts the tiles want, and at the end the
// way from gradients of normalised rows to gradients of the inputs.
#pragma once

#include <cstdlib>

#include "common/convert.h"
#include "common/threads.h"
#include "common/tiles.h"
#include "nt_xent/nt_xent.h"

namespace ubp {
namespace {

constexpr int64_t kMaxBlock = 256;  // rows and columns of a tile
constexpr int64_t kChunk = 64;      // rows that are prepared and finished at a time
constexpr int64_t kMaxWidth = 2048;

template <class V>
UBP_INLINE auto add_lanes(V value) {
  constexpr int kCount = sizeof(V) / sizeof(value[0]);
  auto sum = value[0];
  for (int lane = 1; lane < kCount; ++lane) sum += value[lane];
  return sum;
}

template <class V>
UBP_INLINE auto largest_lane(V value) {
  constexpr int kCount = sizeof(V) / sizeof(value[0]);
  auto largest = value[0];
  for (int lane = 1; lane < kCount; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

// Everything one call allocates. No destructor: unwinding needs a symbol that all instruction sets would
// share. Only the thread that called the kernel takes memory.
class Memory {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)) + 1, 64);
    void* block = std::aligned_alloc(64, static_cast<size_t>(bytes));
    if (block == nullptr) {
      release();
      throw_out_of_memory();
    }
    blocks_[count_++] = block;
    return static_cast<T*>(block);
  }

  template <class T>
  T* take_zeros(int64_t count) {
    T* block = take<T>(count);
    std::memset(static_cast<void*>(block), 0, static_cast<size_t>(count) * sizeof(T));
    return block;
  }

  void release() {
    for (int at = 0; at < count_; ++at) std::free(blocks_[at]);
    count_ = 0;
  }

 private:
  void* blocks_[24];
  int count_ = 0;
};

// The rows, or the columns, of the matrix of similarities.
template <class A>
struct Side {
  int64_t first, count;                // numbers of its rows among [left; right]
  typename A::Element* rows;           // [stored_rows, stride], zeros behind the last one
  typename A::Element* steps;          // two rows side by side for pairs, else `rows`
  typename A::Element* panels;         // [stored_rows / panel][steps of a row][panel]; columns only
  typename A::Real* grad;              // [count, step_stride]
  int64_t stride, step_stride, width;  // `width`: steps of a row
};

// What all tiles share. Per-row arrays have an entry for each row of left, then of right, then of positive.
template <class A>
struct Run {
  const NTXentProblem* problem;
  Side<A> row_side, column_side;  // the same for simclr
  Side<A> positive_side;          // rows given as positives, numbered after those of right; else the columns
  int64_t rows;                   // of left and right
  int64_t block, group;           // rows of a tile, tiles along a side of an item
  int64_t row_groups, column_groups;
  double inverse;  // 1 / temperature
  bool is_shared, is_backward;
  typename A::Real *scales,
      *column_scales;                 // pairs: row = scale * stored row; columns also times 1 / temperature
  double* stored_lengths;             // pairs: length of the stored row
  double* lengths;                    // of the input row
  typename A::Real* positives;        // [left_count] s_i,p(i) / temperature + bias
  typename A::Real* positive_bias;    // [left_count]
  typename A::Real* maxima;           // forward, running maximum of s / temperature
  double* sums;                       // forward, sum of exponentials of the negatives
  typename A::Real* factors;          // backward, shared: weight exp(-s_i,p(i) / tau - loss); else weight
  double* moments;                    // [row_groups]
  int64_t *row_turns, *column_turns;  // [groups] of how many items a group is done
};

template <class A>
constexpr int64_t kPanel = kRegisterColumns * A::kLanes;  // columns of one packed panel

// At least one more than there are, and whole panels.
template <class A>
int64_t stored_rows(const Side<A>& side) {
  return round_up(side.count + 1, kPanel<A>);
}

// Largest |s| / tau whose exponential one Real holds for rows and columns, see cpu.cpp.
template <class A>
constexpr double kLargestShared = sizeof(typename A::Real) == sizeof(double) ? 300.0 : 60.0;

template <class A>
constexpr bool kIsScaled = A::kPair == 2;  // normalised rows are not stored: bfloat16 would round them

template <class T>
void read_numbers(const void* tensor, int64_t row, int64_t width, double* target) {
  const T* source = static_cast<const T*>(tensor) + row * width;
  for (int64_t at = 0; at < width; ++at) target[at] = static_cast<double>(to_float(source[at]));
}

// A row that takes part: where it lies, and where its gradient goes.
struct Place {
  const void* tensor;
  void* grad;
  int64_t row;
};

Place place_of(const NTXentProblem& problem, int64_t index) {  // among [left; right; positive]
  const int64_t left = problem.left_count, right = problem.right_count;
  if (index < left) return {problem.left, problem.grad_left, problem.left_kept[index]};
  if (index < left + right) return {problem.right, problem.grad_right, problem.right_kept[index - left]};
  return {problem.positive, problem.grad_positive, problem.left_kept[index - left - right]};
}

int64_t id_of(const NTXentProblem& problem, int64_t index) {
  return index < problem.left_count ? problem.left_ids[index] : problem.right_ids[index - problem.left_count];
}

// The column that is no negative of a row whatever its id; matched rows have ids for that.
int64_t place_of_query(const NTXentProblem& problem, int64_t index) {
  return problem.places == nullptr ? -1 : problem.places[index];
}

void read_row(const NTXentProblem& problem, const Place& place, double* target) {
  if (problem.dtype == DType::kFloat32) read_numbers<float>(place.tensor, place.row, problem.width, target);
  if (problem.dtype == DType::kBFloat16)
    read_numbers<BFloat16>(place.tensor, place.row, problem.width, target);
  if (problem.dtype == DType::kFloat16) read_numbers<Float16>(place.tensor, place.row, problem.width, target);
}

constexpr int64_t kDoubles = kWidth / 2;  // in a vector

double larger(double one, double other) { return one > other ? one : other; }

double dot_product(const double* a, const double* b, int64_t count) {  // `count` in whole vectors
  DoubleVec sum = {};
  for (int64_t at = 0; at < count; at += kDoubles)
    sum += load_as<DoubleVec>(a + at) * load_as<DoubleVec>(b + at);
  return add_lanes(sum);
}

double largest_magnitude(const double* row, int64_t count) {
  DoubleVec largest = {};
  for (int64_t at = 0; at < count; at += kDoubles) {
    const DoubleVec value = load_as<DoubleVec>(row + at), magnitude = value < 0.0 ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest_lane(largest);
}

void divide(double* row, int64_t count, double by) {
  for (int64_t at = 0; at < count; at += kDoubles) store_as(row + at, load_as<DoubleVec>(row + at) / by);
}

// No |s| / tau + bias is larger.
double largest_exponent(const NTXentProblem& problem) {
  double biases = 0;
  if (problem.right_bias != nullptr) {
    for (int64_t row = 0; row < problem.right_count; ++row)
      biases = larger(biases, std::fabs(problem.right_bias[row]));
    for (int64_t row = 0; row < problem.left_count; ++row)
      biases = larger(biases, std::fabs(problem.positive_bias[row]));
  }
  if (problem.is_normalized) return 1.0 / problem.temperature + biases;
  double longest[3] = {};  // of left, right and positive
  alignas(64) double row[kMaxWidth + 16] = {};
  const auto measure = [&](const Place& place, double& most) {
    read_row(problem, place, row);
    const double length = std::sqrt(dot_product(row, row, round_up(problem.width, 16)));
    if (!(length <= most)) most = length;
  };
  const int64_t left = problem.left_count, both = left + problem.right_count;
  for (int64_t index = 0; index < both + (problem.positive == nullptr ? 0 : left); ++index)
    measure(place_of(problem, index), longest[index < left ? 0 : index < both ? 1 : 2]);
  if (problem.form == NTXentForm::kSimclr) longest[0] = longest[1] = larger(longest[0], longest[1]);
  return longest[0] * larger(longest[1], longest[2]) / problem.temperature + biases;
}

double power_of_two_below(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= uint64_t{0x7ff} << 52;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Rows are divided by their largest number before their length is taken, as in the reference: rows of one
// number then become exactly 1 or -1. For pairs by a power of two only, so that bfloat16 keeps every digit.
template <class A>
void normalise(const Run<A>& run, int64_t index, double* row, int64_t padded) {
  run.scales[index] = 1;
  run.column_scales[index] = static_cast<typename A::Real>(run.inverse);
  run.stored_lengths[index] = 1.0;
  if (!run.problem->is_normalized) {
    run.lengths[index] = std::sqrt(dot_product(row, row, padded));
    return;
  }
  const double largest = largest_magnitude(row, padded);
  run.lengths[index] = 0.0;
  if (!(largest > 0.0)) return;
  const double divisor = kIsScaled<A> ? power_of_two_below(largest) : largest;
  divide(row, padded, divisor);
  const double length = std::sqrt(dot_product(row, row, padded));
  run.lengths[index] = length * divisor;
  if (kIsScaled<A>) {
    run.stored_lengths[index] = length;
    run.scales[index] = static_cast<typename A::Real>(1.0 / length);
    run.column_scales[index] = static_cast<typename A::Real>(run.inverse / length);
  } else {
    divide(row, padded, length);
  }
}

inline uint32_t pair_of(double low, double high) {
  BFloat16 a, b;
  from_float(static_cast<float>(low), a);
  from_float(static_cast<float>(high), b);
  return uint32_t{a.bits} | uint32_t{b.bits} << 16;
}

template <class Number>
void fill_zeros(Number* numbers, int64_t begin, int64_t end) {
  std::memset(static_cast<void*>(numbers + begin), 0, static_cast<size_t>(end - begin) * sizeof(Number));
}

template <class A>
void store_row(const Side<A>& side, int64_t at, const double* row) {
  typename A::Element* target = side.rows + at * side.stride;
  fill_zeros(target, side.width, side.stride);
  for (int64_t step = 0; step < side.width; ++step) {
    if constexpr (kIsScaled<A>)
      target[step] = pair_of(row[2 * step], row[2 * step + 1]);
    else
      target[step] = static_cast<typename A::Element>(row[step]);
  }
}

// One row into its panel. Without scales the panels carry 1 / temperature: each number is rounded by itself,
// a factor of all products would err in one direction.
template <class A>
void pack_column(const Run<A>& run, const Side<A>& side, int64_t at, const double* row) {
  const int64_t lane = at % kPanel<A>;
  typename A::Element* panel = side.panels + (at - lane) * side.width + lane;
  for (int64_t step = 0; step < side.width; ++step) {
    if constexpr (kIsScaled<A>)
      panel[step * kPanel<A>] = side.rows[at * side.stride + step];
    else
      panel[step * kPanel<A>] = static_cast<typename A::Element>(row[step] * run.inverse);
  }
}

template <class A>
struct SideOfRun {
  const Run<A>* run;
  const Side<A>* side;
};

// Zeros are filled in here, too: by all threads, where a few of the rows at a time are near anyway.
template <class A>
void prepare_block(void* context, int64_t block, int) {
  const auto& [run, side] = *static_cast<SideOfRun<A>*>(context);
  alignas(64) double row[kMaxWidth + 16];
  const int64_t padded = round_up(run->problem->width, 16), start = block * kChunk,
                end = smaller(start + kChunk, side->count),
                stored_end = end == side->count ? stored_rows(*side) : end;
  for (int64_t at = start; at < stored_end; ++at) {
    const bool exists = at < end;
    fill_zeros(row, exists ? run->problem->width : 0, padded);
    if (exists) {
      read_row(*run->problem, place_of(*run->problem, side->first + at), row);
      normalise(*run, side->first + at, row, padded);
    }
    store_row(*side, at, row);
    if (side->panels != nullptr) pack_column(*run, *side, at, row);
  }
  if (side->grad != nullptr) fill_zeros(side->grad, start * side->step_stride, end * side->step_stride);
  if constexpr (kIsScaled<A>) {
    if (run->is_backward)
      for (int64_t at = start; at < stored_end; at += 2) {
        typename A::Element* steps = side->steps + at / 2 * side->step_stride;
        A::join_rows(side->rows + at * side->stride, side->rows + (at + 1) * side->stride, side->width,
                     steps);
        fill_zeros(steps, 2 * side->width, side->step_stride);
      }
  }
}

// Number `column` of a normalised row.
template <class A>
void unit_row(const Run<A>& run, const Side<A>& side, int64_t at, int64_t padded, double* target) {
  const typename A::Element* row = side.rows + at * side.stride;
  for (int64_t step = 0; step < padded / A::kPair; ++step) {
    if constexpr (kIsScaled<A>) {
      target[2 * step] = static_cast<double>(bits_to_float(row[step] << 16));
      target[2 * step + 1] = static_cast<double>(bits_to_float(row[step] & 0xffff0000u));
    } else {
      target[step] = static_cast<double>(row[step]);
    }
  }
  if (kIsScaled<A>) divide(target, padded, run.stored_lengths[side.first + at]);
}

template <class T>
void write_numbers(void* tensor, int64_t row, int64_t width, const double* numbers) {
  T* target = static_cast<T*>(tensor) + row * width;
  for (int64_t at = 0; at < width; ++at) from_float(static_cast<float>(numbers[at]), target[at]);
}

void write_row(const NTXentProblem& problem, const Place& place, const double* numbers) {
  if (problem.dtype == DType::kFloat32) write_numbers<float>(place.grad, place.row, problem.width, numbers);
  if (problem.dtype == DType::kBFloat16)
    write_numbers<BFloat16>(place.grad, place.row, problem.width, numbers);
  if (problem.dtype == DType::kFloat16) write_numbers<Float16>(place.grad, place.row, problem.width, numbers);
}

// The positive's entry of the gradient is minus the sum of the row's others: no cancellation when the loss is
// near zero.
double slope_of_positive(const NTXentProblem& problem, int64_t index) {
  return -problem.shares[index] * static_cast<double>(problem.weight[index]);
}

double slope_of_pair(const NTXentProblem& problem, int64_t pair) {
  const double slope = slope_of_positive(problem, pair);
  return problem.form == NTXentForm::kCross ? slope
                                            : slope + slope_of_positive(problem, pair + problem.left_count);
}

// From the gradient of a row of the loss to that of the input row.
void finish_row(const NTXentProblem& problem, const Place& place, const double* unit, double length,
                double* slope) {
  const int64_t padded = round_up(problem.width, 16);
  double factor = problem.factor;
  if (problem.is_normalized) {
    const double along = dot_product(slope, unit, padded);
    for (int64_t column = 0; column < padded; ++column) slope[column] -= unit[column] * along;
    factor = length > 0.0 ? factor / length : 0.0;
  }
  for (int64_t column = 0; column < padded; ++column)
    slope[column] = factor == 0.0 ? 0.0 : slope[column] * factor;
  write_row(problem, place, slope);
}

// Number of the positive of a row of left.
template <class A>
int64_t partner_of(const Run<A>& run, int64_t row) {
  return (run.problem->positive == nullptr ? run.problem->left_count : run.rows) + row;
}

template <class A>
void finish_block(void* context, int64_t block, int) {
  const auto& [run, side] = *static_cast<SideOfRun<A>*>(context);
  const NTXentProblem& problem = *run->problem;
  alignas(64) double unit[kMaxWidth], partner[kMaxWidth], slope[kMaxWidth];
  const int64_t padded = round_up(problem.width, 16);
  for (int64_t at = block * kChunk; at < smaller((block + 1) * kChunk, side->count); ++at) {
    const int64_t index = side->first + at;
    const bool is_left = index < problem.left_count, is_matched = problem.positive == nullptr;
    unit_row(*run, *side, at, padded, unit);
    double by_positive = 0.0;
    if (is_left) {
      const Side<A>& partners = run->positive_side;
      const int64_t number = partner_of(*run, index);
      unit_row(*run, partners, number - partners.first, padded, partner);
      by_positive = is_matched ? slope_of_pair(problem, index) : slope_of_positive(problem, index);
      if (!is_matched) {
        for (int64_t column = 0; column < padded; ++column) slope[column] = by_positive * unit[column];
        finish_row(problem, place_of(problem, number), partner, run->lengths[number], slope);
      }
    } else if (is_matched) {
      unit_row(*run, run->row_side, index - problem.left_count, padded, partner);
      by_positive = slope_of_pair(problem, index - problem.left_count);
    }
    const double stored = kIsScaled<A> ? run->stored_lengths[index] * problem.temperature : 1.0;
    const typename A::Real* grad = side->grad + at * side->step_stride;
    for (int64_t column = 0; column < padded; ++column) {
      slope[column] = static_cast<double>(grad[column]) * stored;
      if (by_positive != 0.0) slope[column] += by_positive * partner[column];
    }
    finish_row(problem, place_of(problem, index), unit, run->lengths[index], slope);
  }
}

}  // namespace
}  // namespace ubp
