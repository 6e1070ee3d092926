// nt_xent on the CPU, compiled once per instruction set.
//
// The matrix of products is cut into tiles of 192 x 192. Each tile is computed once and serves its rows and
// its columns; simclr's matrix is symmetric, there only the tiles on and above the diagonal are computed.
//
//   forward    tile -> exponentials -> row sums, column sums
//   backward   tile -> G = weight p (rows) + weight p (columns) -> dA += G B, dB += G^T A
//
// Tiles run in phases. Within a phase no two tiles share rows or columns, so threads never write to the same
// place, and each sum is added up in the order of the phases: results do not depend on the thread count.
//
// Where |d| / tau stays below 60 for all pairs, exp(d / tau) and its sums fit into a float with full
// precision and one exponential serves row and column. Otherwise rows and columns keep running maxima and
// take one each.
#include <cmath>
#include <cstdlib>

#include "common/gemm.h"
#include "common/threads.h"
#include "nt_xent/nt_xent.h"

#define UBP_JOIN_(a, b) a##b
#define UBP_JOIN(a, b) UBP_JOIN_(a, b)

namespace ubp {
namespace {

constexpr int64_t kBlock = 192;                        // rows and columns of a tile
constexpr int64_t kStripe = 96;                        // rows of it that are computed at a time: 72 KiB
constexpr int64_t kPanel = kRegisterColumns * kWidth;  // columns of one packed panel
constexpr double kLargestShared = 60.0;
static_assert(kBlock % kPanel == 0 && kBlock % kStripe == 0, "tiles consist of whole panels and stripes");

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
T* allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 64) / 64 * 64;
  T* block = static_cast<T*>(std::aligned_alloc(64, bytes));
  if (block == nullptr) std::abort();
  return block;
}

// What all tiles share. Per-row arrays have 2 pairs entries; columns of cross and symmetric start at
// `second`.
struct Run {
  const NTXentProblem* problem;
  int64_t side;    // rows, and columns, of the matrix
  int64_t blocks;  // of rows, and of columns
  int64_t second;  // where the columns' rows start
  float inverse;   // 1 / temperature
  bool is_shared;  // one exponential for row and column
  bool is_backward;
  int64_t phase;
  float* panels;     // [side / kPanel][width][kPanel]
  float* positives;  // [pairs] d_i,p(i)
  float* maxima;     // forward, running maximum of d
  double* sums;      // forward, sum of exponentials of the negatives
  float* factors;    // backward, shared: weight exp(-d_i,p(i) / tau - loss); else weight
  double* moments;   // [blocks]
};

// Sequential over the width like `multiply`: equal rows then have a gap of exactly 0.
void positive_products(Run& run) {
  constexpr int64_t kChains = 8;
  const NTXentProblem& problem = *run.problem;
  const float *left = problem.rows, *right = problem.rows + problem.pairs * problem.stride;
  for (int64_t first = 0; first < problem.pairs; first += kChains) {
    const int64_t count = smaller(kChains, problem.pairs - first);
    float products[kChains] = {};
    for (int64_t column = 0; column < problem.width; ++column)
      for (int64_t at = 0; at < count; ++at) {
        const int64_t here = (first + at) * problem.stride + column;
        products[at] += left[here] * right[here];
      }
    for (int64_t at = 0; at < count; ++at) run.positives[first + at] = products[at];
  }
}

double longest_squared(const float* rows, int64_t count, const NTXentProblem& problem) {
  double longest = 0;
  for (int64_t row = 0; row < count; ++row) {
    Vec squares = {};
    for (int64_t at = 0; at < problem.width; at += kWidth) {
      const Vec part = load(rows + row * problem.stride + at);
      squares += part * part;
    }
    const double length = sum_lanes(squares);
    if (!(length <= longest)) longest = length;
  }
  return longest;
}

void pack_panels(Run& run) {
  const NTXentProblem& problem = *run.problem;
  const float* rows = problem.rows + run.second * problem.stride;
  for (int64_t first = 0; first < run.side; first += kPanel) {
    float* panel = run.panels + first * problem.width;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const float* row = rows + (first + lane) * problem.stride;
      const bool exists = first + lane < run.side;
      for (int64_t at = 0; at < problem.width; ++at) panel[at * kPanel + lane] = exists ? row[at] : 0.f;
    }
  }
}

// One tile: where its rows and columns are, and copies of what belongs to its columns, padded to whole
// vectors.
struct Tile {
  int64_t first_row, rows, first_column, columns, padded;
  bool is_diagonal;  // of a symmetric matrix: columns repeat the rows
  bool is_masked;    // some pairs are no negatives
  alignas(64) float positives[kBlock];
  alignas(64) float factors[kBlock];
  alignas(64) float losses[kBlock], rests[kBlock];  // loss = float + rest: large losses keep their digits
  alignas(64) int32_t ids[kBlock];
  alignas(64) float products[kStripe * kBlock];
};

bool meets_diagonal(const Run& run, int64_t first_row, int64_t first_column) {
  const auto overlaps = [&](int64_t shift) {
    const int64_t distance = first_column - first_row - shift;
    return distance > -kBlock && distance < kBlock;
  };
  const int64_t pairs = run.problem->pairs;
  return overlaps(0) || (run.problem->form == NTXentForm::kSimclr && (overlaps(pairs) || overlaps(-pairs)));
}

void place_tile(const Run& run, int64_t row_block, int64_t column_block, Tile& tile) {
  const NTXentProblem& problem = *run.problem;
  tile.first_row = row_block * kBlock;
  tile.first_column = column_block * kBlock;
  tile.rows = smaller(kBlock, run.side - tile.first_row);
  tile.columns = smaller(kBlock, run.side - tile.first_column);
  tile.padded = (tile.columns + kPanel - 1) / kPanel * kPanel;
  tile.is_diagonal = problem.form == NTXentForm::kSimclr && row_block == column_block;
  tile.is_masked =
      problem.has_ids || tile.columns < tile.padded || meets_diagonal(run, tile.first_row, tile.first_column);
  for (int64_t at = 0; at < tile.padded; ++at) {
    const bool exists = at < tile.columns;
    const int64_t column = tile.first_column + (exists ? at : 0), pair = column % problem.pairs;
    const bool has_loss = problem.form != NTXentForm::kCross;
    tile.positives[at] = run.positives[pair];
    tile.ids[at] = exists ? problem.ids[pair] : -1;
    tile.factors[at] = run.is_backward && has_loss ? run.factors[run.second + column] : 0.f;
    const double loss = run.is_backward && has_loss ? problem.losses[run.second + column] : 0.0;
    tile.losses[at] = static_cast<float>(loss);
    tile.rests[at] = static_cast<float>(loss - tile.losses[at]);
  }
}

void multiply_stripe(const Run& run, Tile& tile, int64_t first, int64_t rows) {
  const NTXentProblem& problem = *run.problem;
  const Operand left{problem.rows + (tile.first_row + first) * problem.stride, problem.stride};
  for (int64_t column = 0; column < tile.padded; column += kPanel) {
    const Operand right{run.panels + (tile.first_column + column) * problem.width, kPanel};
    multiply<false>(tile.products + column, kBlock, left, right, rows, kPanel, problem.width, false);
  }
}

UBP_INLINE IntVec no_negative(const Tile& tile, int64_t at, int32_t id) {
  IntVec ids;
  std::memcpy(&ids, tile.ids + at, sizeof(ids));
  return (ids == id) | (ids < 0);
}

template <bool kIsMasked>
void shared_sums(const Run& run, Tile& tile, int64_t first, int64_t rows, float* column_sums) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* products = tile.products + row * kBlock;
    const int64_t index = tile.first_row + first + row;
    const int32_t id = run.problem->ids[index % run.problem->pairs];
    Vec sum = {};
    for (int64_t at = 0; at < tile.padded; at += kWidth) {
      Vec value = exponential(load(products + at) * run.inverse);
      if (kIsMasked) value = no_negative(tile, at, id) ? Vec{} : value;
      sum += value;
      store(column_sums + at, load(column_sums + at) + value);
    }
    run.sums[index] += static_cast<double>(sum_lanes(sum));
  }
}

void raise_maximum(const Run& run, int64_t index, float largest) {
  if (!(largest > run.maxima[index])) return;
  run.sums[index] *= std::exp((static_cast<double>(run.maxima[index]) - largest) * run.inverse);
  run.maxima[index] = largest;
}

// Rows, then columns, of a stripe whose excluded products are -infinity.
void running_sums(const Run& run, Tile& tile, int64_t first, int64_t rows, bool has_columns) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* products = tile.products + row * kBlock;
    const int64_t index = tile.first_row + first + row;
    Vec largest = broadcast(-INFINITY), sum = {};
    for (int64_t at = 0; at < tile.padded; at += kWidth) largest = maximum(largest, load(products + at));
    raise_maximum(run, index, max_lanes(largest));
    for (int64_t at = 0; at < tile.padded; at += kWidth)
      sum += exponential((load(products + at) - run.maxima[index]) * run.inverse);
    run.sums[index] += static_cast<double>(sum_lanes(sum));
  }
  if (!has_columns) return;
  for (int64_t at = 0; at < tile.padded; at += kWidth) {
    Vec largest = broadcast(-INFINITY), sum = {};
    for (int64_t row = 0; row < rows; ++row)
      largest = maximum(largest, load(tile.products + row * kBlock + at));
    const int64_t count = smaller(kWidth, tile.columns - at), index = run.second + tile.first_column + at;
    Vec reference = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      raise_maximum(run, index + lane, largest[lane]);
      reference[lane] = run.maxima[index + lane];
    }
    for (int64_t row = 0; row < rows; ++row)
      sum += exponential((load(tile.products + row * kBlock + at) - reference) * run.inverse);
    for (int64_t lane = 0; lane < count; ++lane) run.sums[index + lane] += static_cast<double>(sum[lane]);
  }
}

void exclude(const Run& run, Tile& tile, int64_t first, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t id = run.problem->ids[(tile.first_row + first + row) % run.problem->pairs];
    float* products = tile.products + row * kBlock;
    for (int64_t at = 0; at < tile.padded; at += kWidth)
      store(products + at, no_negative(tile, at, id) ? broadcast(-INFINITY) : load(products + at));
  }
}

void forward_tile(const Run& run, Tile& tile) {
  alignas(64) float column_sums[kBlock] = {};
  const bool has_columns = run.problem->form != NTXentForm::kCross && !tile.is_diagonal;
  for (int64_t first = 0; first < tile.rows; first += kStripe) {
    const int64_t rows = smaller(kStripe, tile.rows - first);
    multiply_stripe(run, tile, first, rows);
    if (!run.is_shared) {
      if (tile.is_masked) exclude(run, tile, first, rows);
      running_sums(run, tile, first, rows, has_columns);
    } else if (tile.is_masked) {
      shared_sums<true>(run, tile, first, rows, column_sums);
    } else {
      shared_sums<false>(run, tile, first, rows, column_sums);
    }
  }
  if (!run.is_shared || !has_columns) return;
  for (int64_t at = 0; at < tile.columns; ++at)
    run.sums[run.second + tile.first_column + at] += static_cast<double>(column_sums[at]);
}

// Products -> G in place. Returns sum G (d - positive), rows and columns each with their own positive.
template <bool kIsShared, bool kIsMasked>
double gradient_stripe(const Run& run, Tile& tile, int64_t first, int64_t rows) {
  double total = 0;
  const bool has_columns = run.problem->form != NTXentForm::kCross;
  for (int64_t row = 0; row < rows; ++row) {
    float* products = tile.products + row * kBlock;
    const int64_t index = tile.first_row + first + row, pair = index % run.problem->pairs;
    const int32_t id = run.problem->ids[pair];
    const float positive = run.positives[pair], factor = run.factors[index],
                loss = static_cast<float>(run.problem->losses[index]);
    const float rest = static_cast<float>(run.problem->losses[index] - loss);
    Vec moment = {};
    for (int64_t at = 0; at < tile.padded; at += kWidth) {
      const Vec product = load(products + at);
      const Vec row_gap = product - positive, column_gap = product - load(tile.positives + at);
      Vec by_row, by_column = {};
      if (kIsShared) {
        const Vec value = exponential(product * run.inverse);
        by_row = value * factor;
        by_column = value * load(tile.factors + at);
      } else {
        by_row = exponential(row_gap * run.inverse - loss - rest) * factor;
        if (has_columns)
          by_column = exponential(column_gap * run.inverse - load(tile.losses + at) - load(tile.rests + at)) *
                      load(tile.factors + at);
      }
      if (kIsMasked) {
        const IntVec excluded = no_negative(tile, at, id);
        by_row = excluded ? Vec{} : by_row;
        by_column = excluded ? Vec{} : by_column;
      }
      moment += by_row * row_gap + by_column * column_gap;
      store(products + at, by_row + by_column);
    }
    total += static_cast<double>(sum_lanes(moment));
  }
  return total;
}

void backward_tile(const Run& run, Tile& tile, int64_t row_block) {
  const NTXentProblem& problem = *run.problem;
  const int64_t stride = problem.stride, padded_width = (problem.width + kWidth - 1) / kWidth * kWidth;
  const int64_t columns_start = (run.second + tile.first_column) * stride;
  double moment = 0;
  for (int64_t first = 0; first < tile.rows; first += kStripe) {
    const int64_t rows = smaller(kStripe, tile.rows - first), start = (tile.first_row + first) * stride;
    multiply_stripe(run, tile, first, rows);
    if (run.is_shared)
      moment += tile.is_masked ? gradient_stripe<true, true>(run, tile, first, rows)
                               : gradient_stripe<true, false>(run, tile, first, rows);
    else
      moment += tile.is_masked ? gradient_stripe<false, true>(run, tile, first, rows)
                               : gradient_stripe<false, false>(run, tile, first, rows);
    const Operand gradients{tile.products, kBlock};
    multiply<false>(problem.grad_rows + start, stride, gradients, {problem.rows + columns_start, stride},
                    rows, padded_width, tile.columns, true);
    if (!tile.is_diagonal)
      multiply<true>(problem.grad_rows + columns_start, stride, gradients, {problem.rows + start, stride},
                     tile.columns, padded_width, rows, true);
  }
  run.moments[row_block] +=
      tile.is_diagonal ? moment / 2 : moment;  // there each pair was met from both sides
}

// The tiles of a phase. Symmetric matrix: blocks i and j with i + j = 2 phase modulo an odd number, which
// pairs each block with one other; the one that is left meets itself.
void run_item(void* context, int64_t item, int) {
  const Run& run = *static_cast<Run*>(context);
  int64_t row_block = item, column_block = (item + run.phase) % run.blocks;
  if (run.problem->form == NTXentForm::kSimclr) {
    const int64_t odd = run.blocks | 1, one = (run.phase + item) % odd,
                  other = (run.phase - item + odd) % odd;
    row_block = smaller(one, other);
    column_block = one + other - row_block;
    if (column_block >= run.blocks) return;
  }
  Tile tile;
  place_tile(run, row_block, column_block, tile);
  if (run.is_backward)
    backward_tile(run, tile, row_block);
  else
    forward_tile(run, tile);
}

void run_phases(Run& run) {
  const bool is_simclr = run.problem->form == NTXentForm::kSimclr;
  const int64_t phases = is_simclr ? run.blocks | 1 : run.blocks;
  for (run.phase = 0; run.phase < phases; ++run.phase)
    parallel_for(is_simclr ? (phases + 1) / 2 : run.blocks, run.problem->threads, &run_item, &run);
}

Run start(const NTXentProblem& problem, bool is_backward) {
  Run run{};
  run.problem = &problem;
  run.is_backward = is_backward;
  const bool is_simclr = problem.form == NTXentForm::kSimclr;
  run.side = is_simclr ? 2 * problem.pairs : problem.pairs;
  run.second = is_simclr ? 0 : problem.pairs;
  run.blocks = (run.side + kBlock - 1) / kBlock;
  run.inverse = static_cast<float>(1.0 / problem.temperature);
  run.panels = allocate<float>((run.side + kPanel - 1) / kPanel * kPanel * problem.width);
  run.positives = allocate<float>(problem.pairs);
  const int64_t pairs = problem.pairs;
  const double left = longest_squared(problem.rows, pairs, problem);
  const double right = longest_squared(problem.rows + pairs * problem.stride, pairs, problem);
  const double largest = is_simclr ? (left > right ? left : right) : std::sqrt(left) * std::sqrt(right);
  run.is_shared = largest / problem.temperature <= kLargestShared;
  positive_products(run);
  pack_panels(run);
  return run;
}

void finish(Run& run) {
  std::free(run.panels);
  std::free(run.positives);
}

// exp of one number, exactly as the tiles compute it: equal products must give equal exponentials.
double exponential_of(float value) { return static_cast<double>(exponential(broadcast(value))[0]); }

void forward(const NTXentProblem& problem) {
  Run run = start(problem, false);
  const int64_t rows = 2 * problem.pairs;
  run.maxima = allocate<float>(rows);
  run.sums = allocate<double>(rows);
  for (int64_t row = 0; row < rows; ++row)
    run.sums[row] = 0, run.maxima[row] = run.positives[row % problem.pairs];
  run_phases(run);
  const int64_t losses = problem.form == NTXentForm::kCross ? problem.pairs : rows;
  for (int64_t row = 0; row < losses; ++row) {
    const float positive = run.positives[row % problem.pairs];
    if (run.is_shared) {
      problem.losses[row] =
          static_cast<float>(std::log1p(run.sums[row] / exponential_of(positive * run.inverse)));
    } else {
      const double peak = (static_cast<double>(run.maxima[row]) - positive) * run.inverse;
      problem.losses[row] = peak + std::log1p(std::expm1(-peak) + run.sums[row]);
    }
  }
  std::free(run.maxima);
  std::free(run.sums);
  finish(run);
}

// The positive's entry of G is minus the sum of the row's others: no cancellation when the loss is near zero.
void add_positives(const Run& run) {
  const NTXentProblem& problem = *run.problem;
  for (int64_t pair = 0; pair < problem.pairs; ++pair) {
    double share = -std::expm1(-problem.losses[pair]);
    if (problem.form != NTXentForm::kCross) share -= std::expm1(-problem.losses[pair + problem.pairs]);
    const float slope = -static_cast<float>(share * problem.weight[pair]);
    const int64_t left = pair * problem.stride, right = (pair + problem.pairs) * problem.stride;
    for (int64_t at = 0; at < problem.width; ++at) {
      problem.grad_rows[left + at] += slope * problem.rows[right + at];
      problem.grad_rows[right + at] += slope * problem.rows[left + at];
    }
  }
}

void backward(const NTXentProblem& problem) {
  Run run = start(problem, true);
  const int64_t rows = problem.form == NTXentForm::kCross ? problem.pairs : 2 * problem.pairs;
  run.factors = allocate<float>(rows);
  run.moments = allocate<double>(run.blocks);
  for (int64_t block = 0; block < run.blocks; ++block) run.moments[block] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t pair = row % problem.pairs;
    double factor = problem.weight[pair];
    if (run.is_shared)
      factor *= std::exp(-problem.losses[row]) / exponential_of(run.positives[pair] * run.inverse);
    run.factors[row] = static_cast<float>(factor);
  }
  for (int64_t at = 0; at < 2 * problem.pairs * problem.stride; ++at) problem.grad_rows[at] = 0.f;
  run_phases(run);
  add_positives(run);
  double moment = 0;
  for (int64_t block = 0; block < run.blocks; ++block) moment += run.moments[block];
  *problem.moment = moment / problem.temperature;
  std::free(run.factors);
  std::free(run.moments);
  finish(run);
}

}  // namespace

namespace UBP_JOIN(isa_, UBP_ISA) {

void nt_xent_forward(const NTXentProblem& problem) { forward(problem); }
void nt_xent_backward(const NTXentProblem& problem) { backward(problem); }

}  // namespace UBP_JOIN(isa_,UBP_ISA)
}  // namespace ubp
