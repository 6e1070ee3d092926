// From one row of products to weights and gradients of scores: mask, softmax, time_bias, dropout.
//
// kIsPlain rows have neither time_bias nor dropout, and none of their code.
#pragma once

#include "common/philox.h"
#include "flash_attention/rows.h"

namespace ubp {
namespace {

constexpr int kKeyBlock = 256;
constexpr int kMaxBuckets = 106;
constexpr int kSumChains = 4;  // sums of a bucket side by side, to hide the latency of the additions

struct Range {
  int64_t begin, end;
};

// Keys that a query sees.
inline Range visible_keys(const FlashAttentionProblem& problem, const Task& task, int64_t row) {
  const int64_t place = row + task.keys - task.queries;
  const int64_t begin = problem.left < 0 ? 0 : larger(0, place - problem.left);
  const int64_t end = problem.right < 0 ? task.keys : smaller(task.keys, place + problem.right + 1);
  return {begin, larger(begin, end)};
}

// Keys that any of some queries sees, from a whole vector on.
inline Range visible_keys(const FlashAttentionProblem& problem, const Task& task, int64_t row, int64_t rows) {
  const Range first = visible_keys(problem, task, row), last = visible_keys(problem, task, row + rows - 1);
  return {first.begin / kWidth * kWidth, last.end};
}

// A row of a block: where its keys and its queries are.
struct Row {
  int64_t query;      // in the sequence
  int64_t first_key;  // of the block, in the sequence
  int64_t block;      // keys of the block
  int64_t padded;     // the same in whole vectors
  Range visible;      // counted from first_key

  bool is_whole(int64_t at) const { return at >= visible.begin && at + kWidth <= visible.end; }
  IntVec is_visible(int64_t at) const {
    const IntVec key = lanes() + static_cast<int32_t>(at);
    return (key >= static_cast<int32_t>(visible.begin)) & (key < static_cast<int32_t>(visible.end));
  }
};

inline Row make_row(const FlashAttentionProblem& problem, const Task& task, int64_t query, int64_t first_key,
                    int64_t block) {
  const Range seen = visible_keys(problem, task, query);
  const int64_t begin = smaller(larger(seen.begin - first_key, 0), block);
  return {query,
          first_key,
          block,
          round_up(block, kWidth),
          {begin, larger(begin, smaller(seen.end - first_key, block))}};
}

// Scaled scores plus bias, in place; leaves the bucket of each key.
inline void add_time_bias(const FlashAttentionProblem& problem, const Task& task, const Row& row,
                          float* scores, int32_t* buckets) {
  const uint64_t time = static_cast<uint64_t>(problem.query_time_s[task.first_query + row.query]);
  const int64_t* key_times = problem.key_time_s + task.first_key + row.first_key;
  const int64_t last = problem.buckets - 1;
  for (int64_t at = 0; at < row.block; ++at) {
    // Unsigned, so that times too far apart give some bucket and no overflow.
    const uint64_t between = time - static_cast<uint64_t>(key_times[at]);
    const uint64_t apart = static_cast<int64_t>(between) < 0 ? uint64_t{0} - between : between;
    // Exponent and first digit of the float64, as one number: two buckets per octave.
    const double x = static_cast<double>(static_cast<int64_t>(apart + 1));
    int64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const int64_t bucket = (bits >> 51) - 2046;
    buckets[at] = static_cast<int32_t>(bucket < 0 ? 0 : bucket < last ? bucket : last);
  }
  const float* table = problem.time_bias + task.head * problem.buckets;
  for (int64_t at = 0; at < row.block; ++at) scores[at] = scores[at] * problem.scale + table[buckets[at]];
}

// Factors of kWidth weights from key `at` of the row on: 0 or 1 / (1 - p).
inline Vec dropout_factors(const FlashAttentionProblem& problem, const Task& task, const Row& row,
                           int64_t at) {
  const uint32_t key = static_cast<uint32_t>(problem.first_key_row + task.first_key + row.first_key + at);
  const uint32_t query = static_cast<uint32_t>(problem.first_query_row + task.first_query + row.query);
  const WordVec words = philox_words(key, query, static_cast<uint32_t>(task.head), problem.seed);
  return words >= problem.threshold ? broadcast(problem.keep_factor) : Vec{};
}

// Rows that are computed side by side, to hide the latency of their sums.
constexpr int kSideBySide = 4;

template <int kRows>
struct Rows {
  Row each[kRows];

  int64_t padded() const { return each[0].padded; }
  bool are_whole(int64_t at) const {
    for (const Row& row : each)
      if (!row.is_whole(at)) return false;
    return true;
  }
};

template <int kRows>
Rows<kRows> make_rows(const FlashAttentionProblem& problem, const Task& task, int64_t query,
                      int64_t first_key, int64_t block) {
  Rows<kRows> rows;
  for (int row = 0; row < kRows; ++row)
    rows.each[row] = make_row(problem, task, query + row, first_key, block);
  return rows;
}

// Turns rows of products into exp(score - running maximum), dropped ones 0; leaves the factors for what was
// summed before.
template <bool kIsPlain, int kRows>
void softmax_rows(const FlashAttentionProblem& problem, const Task& task, const Rows<kRows>& rows,
                  float* scores, int64_t stride, float* maxima, float* sums, float* factors) {
  float scale = problem.scale;
  if (!kIsPlain && problem.time_bias != nullptr) {
    int32_t buckets[kKeyBlock];
    for (int row = 0; row < kRows; ++row)
      add_time_bias(problem, task, rows.each[row], scores + row * stride, buckets);
    scale = 1.f;
  }
  Vec parts[kRows];
  for (int row = 0; row < kRows; ++row) parts[row] = broadcast(-INFINITY);
  for (int64_t at = 0; at < rows.padded(); at += kWidth) {
    const bool are_whole = rows.are_whole(at);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      Vec score = load(scores + row * stride + at) * scale;
      if (!are_whole) score = rows.each[row].is_visible(at) ? score : broadcast(-INFINITY);
      store(scores + row * stride + at, score);
      parts[row] = maximum(parts[row], score);
    }
  }
  float references[kRows];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const float largest = max_lanes(parts[row]), before = maxima[row];
    maxima[row] = largest > before ? largest : before;
    references[row] = maxima[row] == -INFINITY ? 0.f : maxima[row];
    factors[row] = before == -INFINITY ? 0.f : std::exp(before - references[row]);
    parts[row] = Vec{};
  }
  for (int64_t at = 0; at < rows.padded(); at += kWidth)
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      float* target = scores + row * stride + at;
      Vec weight = exponential(load(target) - references[row]);
      parts[row] += weight;
      if (!kIsPlain && problem.threshold > 0) weight *= dropout_factors(problem, task, rows.each[row], at);
      store(target, weight);
    }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) sums[row] = sums[row] * factors[row] + sum_lanes(parts[row]);
}

// Weights and gradients of rows that see no key beyond the block, and of which none is dropped: <dO, O> is
// the sum of P <dO, V>. Scores are rounded as forward rounds them: where a query sees one key, its weight is
// 1 and its gradient 0.
template <int kRows>
void complete_gradients(const Rows<kRows>& rows, float* scores, float* products, int64_t stride,
                        const float* lse, float scale) {
  Vec parts[kRows] = {};
  for (int64_t at = 0; at < rows.padded(); at += kWidth) {
    const bool are_whole = rows.are_whole(at);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const int64_t place = row * stride + at;
      Vec weight = exponential(rounded_by_itself(load(scores + place) * scale) - lse[row]),
          product = load(products + place);
      if (!are_whole) {
        const IntVec is_visible = rows.each[row].is_visible(at);
        weight = is_visible ? weight : Vec{};
        product = is_visible ? product : Vec{};
        store(products + place, product);
      }
      parts[row] += weight * product;
      store(scores + place, weight);
    }
  }
  float deltas[kRows];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) deltas[row] = sum_lanes(parts[row]);
  for (int64_t at = 0; at < rows.padded(); at += kWidth)
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const int64_t place = row * stride + at;
      store(products + place, load(scores + place) * (load(products + place) - deltas[row]) * scale);
    }
}

template <bool kIsPlain, int kRows>
void partial_gradients(const FlashAttentionProblem& problem, const Task& task, const Rows<kRows>& rows,
                       float* scores, float* products, int64_t stride, const float* lse, const float* deltas,
                       float scale) {
  for (int64_t at = 0; at < rows.padded(); at += kWidth) {
    const bool are_whole = rows.are_whole(at);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const int64_t place = row * stride + at;
      Vec weight = exponential(load(scores + place) * scale - lse[row]), product = load(products + place);
      Vec dropped = weight;
      if (!kIsPlain && problem.threshold > 0) {
        const Vec factors = dropout_factors(problem, task, rows.each[row], at);
        dropped *= factors;
        product *= factors;
      }
      Vec gradient = weight * (product - deltas[row]) * scale;
      if (!are_whole) {
        const IntVec is_visible = rows.each[row].is_visible(at);
        dropped = is_visible ? dropped : Vec{};
        gradient = is_visible ? gradient : Vec{};
      }
      store(scores + place, dropped);
      store(products + place, gradient);
    }
  }
}

// From products QK and <dO, V> to P * M and scale dS, both in place; adds dS to the sums of its buckets.
// `deltas`: <dO, O> of each row; null for rows that are complete.
template <bool kIsPlain, int kRows>
void gradient_rows(const FlashAttentionProblem& problem, const Task& task, const Rows<kRows>& rows,
                   float* scores, float* products, int64_t stride, const float* lse, const float* deltas,
                   double* bucket_sums) {
  const bool has_bias = !kIsPlain && problem.time_bias != nullptr;
  int32_t buckets[kIsPlain ? 1 : kRows][kIsPlain ? 1 : kKeyBlock];
  if (has_bias)
    for (int row = 0; row < kRows; ++row)
      add_time_bias(problem, task, rows.each[row], scores + row * stride, buckets[row]);
  const float scale = has_bias ? 1.f : problem.scale;
  if (deltas == nullptr)
    complete_gradients(rows, scores, products, stride, lse, scale);
  else
    partial_gradients<kIsPlain>(problem, task, rows, scores, products, stride, lse, deltas, scale);
  if (!has_bias) return;
  for (int row = 0; row < kRows; ++row) {
    float* gradients = products + row * stride;
    const Range visible = rows.each[row].visible;
    for (int64_t at = visible.begin; at < visible.end; ++at)
      bucket_sums[(at % kSumChains) * kMaxBuckets + buckets[row][at]] += static_cast<double>(gradients[at]);
    for (int64_t at = 0; at < rows.padded(); at += kWidth)
      store(gradients + at, load(gradients + at) * problem.scale);
  }
}

}  // namespace
}  // namespace ubp
