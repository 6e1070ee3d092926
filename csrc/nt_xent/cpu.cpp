// nt_xent on the CPU, compiled once per instruction set.
//
// The matrix of similarities is cut into tiles of at most 256 x 256. Each tile is computed once and serves
// its rows and its columns; simclr's matrix is symmetric, there only the tiles on and above the diagonal are
// computed.
//
//   forward    tile -> exponentials -> row sums, column sums
//   backward   tile -> G = weight p (rows) + weight p (columns) -> dA += G B, dB += G^T A
//
// Rows and columns form groups of one or two tiles. A thread takes a group of rows and one of columns, which
// are its own for that time, when both are through with all that come before in one fixed order: nobody waits
// for a whole phase, threads never write to the same place, and each sum is added up in that order, so that
// results do not depend on the thread count.
//
// Products are s / tau: the panels of the columns carry the factor. Where it stays below kLargestShared for
// all pairs, its exponentials and their sums fit into a Real with full precision and one exponential serves
// row and column. Otherwise rows and columns keep running maxima and take one each.
//
// Three arithmetics: double for small problems, where it costs a few milliseconds at most, and wherever |s| /
// tau may exceed 60, because float would leave errors of 1e-5 in the exponents; pairs of bfloat16 for inputs
// of that type where the machine has the instruction; float for the rest.
#include <cmath>

#include "nt_xent/rows.h"

namespace ubp {
namespace {

// Rows and columns of a tile that are computed at a time: few enough to be near when they are read again.
constexpr int64_t kStripe = 96;
template <class A>
constexpr int64_t kSpan = kIsScaled<A> ? 128 : 64;
template <class A>
constexpr int64_t kTileStride = kSpan<A> + 16;  // no power of two: rows must not share cache sets
constexpr int64_t kMaxGroup = 2;                // tiles along a side of a group
constexpr int64_t kMostAhead = 16;              // lines asked for with a register tile
constexpr int64_t kTriesBeforeYield = 1000;
constexpr int64_t kExactOperations = int64_t{1} << 25;
static_assert(kStripe % 2 == 0, "whole pairs");

// One tile: where its rows and columns are, and copies of what belongs to its columns, padded to whole
// panels.
template <class A>
struct Tile {
  using Real = typename A::Real;
  int64_t first_row, rows, first_column, columns, padded;
  bool is_diagonal;  // of a symmetric matrix: columns repeat the rows
  bool is_masked;    // some pairs are no negatives, or there are biases
  alignas(64) Real scales[kMaxBlock], positives[kMaxBlock], factors[kMaxBlock];
  alignas(64) Real losses[kMaxBlock], rests[kMaxBlock];  // loss = Real + rest: large losses keep their digits
  alignas(64) Real biases[kMaxBlock];
  alignas(64) typename A::Int ids[kMaxBlock], numbers[kMaxBlock];
  int64_t begin, end;  // columns of `products`, of all from 0 to `padded`
  alignas(64) Real products[kStripe * kTileStride<A>];
  alignas(64) Real row_sums[kMaxBlock * A::kLanes];
  // Products after rounding to pairs of neighbours in a row, and in a column.
  alignas(64) uint32_t across[kIsScaled<A> ? kStripe * kTileStride<A> / 2 : 1];
  alignas(64) uint32_t down[kIsScaled<A> ? kStripe * kTileStride<A> / 2 : 1];
};

template <class A>
bool has_positive(const Run<A>& run, const Tile<A>& tile) {
  const NTXentProblem& problem = *run.problem;
  if (problem.positive != nullptr) {
    for (int64_t row = tile.first_row; row < tile.first_row + tile.rows; ++row) {
      const int64_t distance = problem.places[row] - tile.first_column;
      if (distance >= 0 && distance < tile.columns) return true;
    }
    return false;
  }
  const auto overlaps = [&](int64_t shift) {
    const int64_t distance = tile.first_column - tile.first_row - shift;
    return distance > -run.block && distance < run.block;
  };
  const int64_t pairs = problem.left_count;
  return overlaps(0) || (problem.form == NTXentForm::kSimclr && (overlaps(pairs) || overlaps(-pairs)));
}

template <class A>
void place_tile(const Run<A>& run, int64_t row_block, int64_t column_block, Tile<A>& tile) {
  using Real = typename A::Real;
  const NTXentProblem& problem = *run.problem;
  tile.first_row = row_block * run.block;
  tile.first_column = column_block * run.block;
  tile.rows = smaller(run.block, run.row_side.count - tile.first_row);
  tile.columns = smaller(run.block, run.column_side.count - tile.first_column);
  tile.padded = round_up(tile.columns, kPanel<A>);
  tile.is_diagonal = problem.form == NTXentForm::kSimclr && row_block == column_block;
  tile.is_masked = problem.has_ids || problem.right_bias != nullptr || tile.columns < tile.padded ||
                   has_positive(run, tile);
  const bool has_loss = run.is_backward && problem.form != NTXentForm::kCross;
  for (int64_t at = 0; at < tile.padded; ++at) {
    const bool exists = at < tile.columns;
    const int64_t index = run.column_side.first + tile.first_column + (exists ? at : 0);
    tile.scales[at] = run.column_scales[index];
    tile.positives[at] = problem.positive == nullptr ? run.positives[index % problem.left_count] : Real{0};
    tile.biases[at] = problem.right_bias == nullptr
                          ? Real{0}
                          : static_cast<Real>(problem.right_bias[index - problem.left_count]);
    tile.ids[at] = exists ? static_cast<typename A::Int>(id_of(problem, index)) : -1;
    tile.numbers[at] = static_cast<typename A::Int>(tile.first_column + at);
    tile.factors[at] = has_loss ? run.factors[index] : Real{0};
    const double loss = has_loss ? problem.losses[index] : 0.0;
    tile.losses[at] = static_cast<Real>(loss);
    tile.rests[at] = static_cast<Real>(loss - static_cast<double>(tile.losses[at]));
  }
}

template <class A>
void multiply_stripe(const Run<A>& run, Tile<A>& tile, int64_t first, int64_t rows, Prefetch& prefetch) {
  const Side<A>& a = run.row_side;
  const typename A::Element* left = a.rows + (tile.first_row + first) * a.stride;
  for (int64_t column = tile.begin; column < tile.end; column += kPanel<A>) {
    const typename A::Element* panel = run.column_side.panels + (tile.first_column + column) * a.width;
    for (int64_t part = 0; part < a.width; part += A::kPart)
      multiply<A, false>(tile.products + column - tile.begin, kTileStride<A>, {left + part, a.stride},
                         {panel + part * kPanel<A>, kPanel<A>}, rows, kPanel<A>,
                         smaller(A::kPart, a.width - part), part > 0, &prefetch);
  }
}

// The same steps in the same order as in the tiles: equal rows then have a gap of exactly 0.
template <class A>
void positive_products(void* context, int64_t chunk, int) {
  const Run<A>& run = *static_cast<Run<A>*>(context);
  const Side<A>&a = run.row_side, &b = run.positive_side;
  const double* biases = run.problem->positive_bias;
  const int64_t end = smaller((chunk + 1) * kChunk, run.problem->left_count);
  A::begin_products();
  for (int64_t row = chunk * kChunk; row < end; ++row) {
    const int64_t partner = partner_of(run, row), column = partner - b.first, lane = column % kPanel<A>;
    const typename A::Element* panel = b.panels + (column - lane) * b.width + lane / A::kLanes * A::kLanes;
    alignas(64) typename A::Real products[A::kLanes] = {};
    for (int64_t part = 0; part < a.width; part += A::kPart)
      multiply<A, false>(products, 0, {a.rows + row * a.stride + part, a.stride},
                         {panel + part * kPanel<A>, kPanel<A>}, 1, A::kLanes,
                         smaller(A::kPart, a.width - part), part > 0);
    typename A::Real positive = products[lane % A::kLanes];
    if (kIsScaled<A>) positive = positive * run.scales[row] * run.column_scales[partner];
    run.positive_bias[row] = biases == nullptr ? 0 : static_cast<typename A::Real>(biases[row]);
    run.positives[row] = positive + run.positive_bias[row];
  }
  A::end_products();
}

template <class A>
UBP_INLINE typename A::Vec similarity(const Tile<A>& tile, const typename A::Real* products, int64_t at,
                                      typename A::Real row_scale) {
  using Vec = typename A::Vec;
  const Vec product = load_as<Vec>(products + at - tile.begin);
  return kIsScaled<A> ? product * row_scale * load_as<Vec>(tile.scales + at) : product;
}

template <class A>
UBP_INLINE typename A::IntVec no_negative(const Tile<A>& tile, int64_t at, typename A::Int id,
                                          typename A::Int place) {
  const auto ids = load_as<typename A::IntVec>(tile.ids + at);
  const auto numbers = load_as<typename A::IntVec>(tile.numbers + at);
  return (ids == id) | (ids < 0) | (numbers == place);
}

template <class A, bool kIsMasked>
void shared_sums(const Run<A>& run, Tile<A>& tile, int64_t first, int64_t rows,
                 typename A::Real* column_sums) {
  using Vec = typename A::Vec;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = tile.first_row + first + row;
    const auto id = static_cast<typename A::Int>(id_of(*run.problem, index)),
               place = static_cast<typename A::Int>(place_of_query(*run.problem, index));
    const typename A::Real* products = tile.products + row * kTileStride<A>;
    Vec sum = load_as<Vec>(tile.row_sums + (first + row) * A::kLanes);
    for (int64_t at = tile.begin; at < tile.end; at += A::kLanes) {
      Vec value = similarity(tile, products, at, run.scales[index]);
      if (kIsMasked) value += load_as<Vec>(tile.biases + at);
      value = exponential(value);
      if (kIsMasked) value = no_negative(tile, at, id, place) ? Vec{} : value;
      sum += value;
      typename A::Real* column_sum = column_sums + at - tile.begin;
      store_as(column_sum, load_as<Vec>(column_sum) + value);
    }
    store_as(tile.row_sums + (first + row) * A::kLanes, sum);
  }
}

template <class A>
void raise_maximum(const Run<A>& run, int64_t index, typename A::Real largest) {
  if (!(largest > run.maxima[index])) return;
  run.sums[index] *= std::exp(static_cast<double>(run.maxima[index]) - static_cast<double>(largest));
  run.maxima[index] = largest;
}

// Rows, then columns, of a stripe that holds similarities; those that are no negatives are -infinity.
template <class A>
void running_sums(const Run<A>& run, Tile<A>& tile, int64_t first, int64_t rows, bool has_columns) {
  using Real = typename A::Real;
  using Vec = typename A::Vec;
  const Vec lowest = Vec{} - static_cast<Real>(INFINITY);
  for (int64_t row = 0; row < rows; ++row) {
    const Real* values = tile.products + row * kTileStride<A>;
    const int64_t index = tile.first_row + first + row;
    Vec largest = lowest, sum = {};
    for (int64_t at = tile.begin; at < tile.end; at += A::kLanes) {
      const Vec value = load_as<Vec>(values + at - tile.begin);
      largest = value > largest ? value : largest;
    }
    raise_maximum(run, index, largest_lane(largest));
    for (int64_t at = tile.begin; at < tile.end; at += A::kLanes)
      sum += exponential(load_as<Vec>(values + at - tile.begin) - run.maxima[index]);
    run.sums[index] += static_cast<double>(add_lanes(sum));
  }
  if (!has_columns) return;
  for (int64_t at = tile.begin; at < tile.end; at += A::kLanes) {
    Vec largest = lowest, sum = {}, reference = {};
    for (int64_t row = 0; row < rows; ++row) {
      const Vec value = load_as<Vec>(tile.products + row * kTileStride<A> + at - tile.begin);
      largest = value > largest ? value : largest;
    }
    const int64_t count = smaller(A::kLanes, tile.columns - at),
                  index = run.column_side.first + tile.first_column + at;
    for (int64_t lane = 0; lane < count; ++lane) {
      raise_maximum(run, index + lane, largest[lane]);
      reference[lane] = run.maxima[index + lane];
    }
    for (int64_t row = 0; row < rows; ++row)
      sum += exponential(load_as<Vec>(tile.products + row * kTileStride<A> + at - tile.begin) - reference);
    for (int64_t lane = 0; lane < count; ++lane) run.sums[index + lane] += static_cast<double>(sum[lane]);
  }
}

template <class A>
void mask_similarities(const Run<A>& run, Tile<A>& tile, int64_t first, int64_t rows) {
  using Vec = typename A::Vec;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = tile.first_row + first + row;
    const auto id = static_cast<typename A::Int>(id_of(*run.problem, index)),
               place = static_cast<typename A::Int>(place_of_query(*run.problem, index));
    typename A::Real* products = tile.products + row * kTileStride<A>;
    for (int64_t at = tile.begin; at < tile.end; at += A::kLanes) {
      const Vec value = similarity(tile, products, at, run.scales[index]) + load_as<Vec>(tile.biases + at);
      const Vec lowest = Vec{} - static_cast<typename A::Real>(INFINITY);
      store_as(products + at - tile.begin, no_negative(tile, at, id, place) ? lowest : value);
    }
  }
}

// Numbers of the rows and of the columns of a tile, in tiles.
struct TilePlace {
  int64_t row, column;
};

template <class A>
void ask_for_rows(const Run<A>& run, int64_t first, int64_t end, Prefetch& prefetch) {
  const Side<A>& side = run.row_side;
  const int64_t rows = smaller(end, side.count) - first;
  if (rows <= 0) return;
  prefetch.add(side.rows + first * side.stride, rows * side.stride * sizeof(typename A::Element));
  if (!run.is_backward) return;
  if (kIsScaled<A>)
    prefetch.add(side.steps + first / A::kPair * side.step_stride,
                 rows / A::kPair * side.step_stride * sizeof(typename A::Element));
  prefetch.add(side.grad + first * side.step_stride, rows * side.step_stride * sizeof(typename A::Real));
}

template <class A>
void ask_for_columns(const Run<A>& run, int64_t first, Prefetch& prefetch) {
  const Side<A>& side = run.column_side;
  const int64_t columns = smaller(kSpan<A>, side.count - first);
  prefetch.add(side.panels + first * side.width, columns * side.width * sizeof(typename A::Element));
  if (!run.is_backward) return;
  prefetch.add(side.steps + first / A::kPair * side.step_stride,
               columns / A::kPair * side.step_stride * sizeof(typename A::Element));
  prefetch.add(side.grad + first * side.step_stride, columns * side.step_stride * sizeof(typename A::Real));
}

// What is needed next while a span is worked on: the columns of the span after it, and a share of the rows of
// the next tile. Nothing where a tile is one span: all of the next one would come at once.
template <class A>
Prefetch ask_ahead(const Run<A>& run, const Tile<A>& tile, TilePlace next) {
  Prefetch prefetch;
  if (tile.padded <= kSpan<A>) return prefetch;
  if (tile.end < tile.padded)
    ask_for_columns(run, tile.first_column + tile.end, prefetch);
  else if (next.row >= 0)
    ask_for_columns(run, next.column * run.block, prefetch);
  if (next.row >= 0 && next.row * run.block != tile.first_row) {
    const auto until = [&](int64_t column) {
      return next.row * run.block + run.block * column / tile.padded / A::kPair * A::kPair;
    };
    ask_for_rows(run, until(tile.begin), until(tile.end), prefetch);
  }
  const int64_t columns = tile.end - tile.begin, width = run.problem->width;
  int64_t steps = count_tiles<A>(tile.rows, columns) * ceil_div(run.row_side.width, A::kPart);
  if (run.is_backward)
    steps += count_tiles<A>(tile.rows, width) + count_tiles<A>(columns, width) * ceil_div(tile.rows, kStripe);
  prefetch.spread(steps, kMostAhead);
  return prefetch;
}

// Calls `function` with first row and number of rows for all stripes of all spans, with row sums that start
// at 0. The rows stay in the second-level cache, the columns pass through it once.
template <class A, class Function>
void each_part(const Run<A>& run, Tile<A>& tile, TilePlace next, const Function& function) {
  std::memset(tile.row_sums, 0, sizeof(tile.row_sums));
  for (tile.begin = 0; tile.begin < tile.padded; tile.begin = tile.end) {
    tile.end = smaller(tile.begin + kSpan<A>, tile.padded);
    Prefetch prefetch = ask_ahead(run, tile, next);
    for (int64_t first = 0; first < tile.rows; first += kStripe)
      function(first, smaller(kStripe, tile.rows - first), prefetch);
  }
}

template <class A>
double row_sum(const Tile<A>& tile, int64_t row) {
  return static_cast<double>(add_lanes(load_as<typename A::Vec>(tile.row_sums + row * A::kLanes)));
}

template <class A>
void forward_tile(const Run<A>& run, Tile<A>& tile, TilePlace next) {
  const bool has_columns = run.problem->form != NTXentForm::kCross && !tile.is_diagonal;
  each_part(run, tile, next, [&](int64_t first, int64_t rows, Prefetch& prefetch) {
    multiply_stripe(run, tile, first, rows, prefetch);
    if (!run.is_shared) {
      if (tile.is_masked || kIsScaled<A>) mask_similarities(run, tile, first, rows);
      return running_sums(run, tile, first, rows, has_columns);
    }
    alignas(64) typename A::Real column_sums[kSpan<A>] = {};
    tile.is_masked ? shared_sums<A, true>(run, tile, first, rows, column_sums)
                   : shared_sums<A, false>(run, tile, first, rows, column_sums);
    if (!has_columns) return;
    double* sums = run.sums + run.column_side.first + tile.first_column + tile.begin;
    for (int64_t at = 0; at < smaller(tile.end, tile.columns) - tile.begin; ++at)
      sums[at] += static_cast<double>(column_sums[at]);
  });
  if (!run.is_shared) return;
  for (int64_t row = 0; row < tile.rows; ++row) run.sums[tile.first_row + row] += row_sum(tile, row);
}

// Products -> G in place. Adds sum G (s - positive) without biases to the row sums, rows and columns each
// with their own positive.
template <class A, bool kIsShared, bool kIsMasked>
void gradient_stripe(const Run<A>& run, Tile<A>& tile, int64_t first, int64_t rows) {
  using Real = typename A::Real;
  using Vec = typename A::Vec;
  const bool has_columns = run.problem->form != NTXentForm::kCross;
  for (int64_t row = 0; row < rows; ++row) {
    Real* products = tile.products + row * kTileStride<A>;
    const int64_t index = tile.first_row + first + row, pair = index % run.problem->left_count;
    const auto id = static_cast<typename A::Int>(id_of(*run.problem, index)),
               place = static_cast<typename A::Int>(place_of_query(*run.problem, index));
    const Real positive = run.positives[pair], bias = run.positive_bias[pair], factor = run.factors[index],
               scale = run.scales[index], loss = static_cast<Real>(run.problem->losses[index]),
               rest = static_cast<Real>(run.problem->losses[index] - static_cast<double>(loss));
    Vec moment = load_as<Vec>(tile.row_sums + (first + row) * A::kLanes);
    for (int64_t at = tile.begin; at < tile.end; at += A::kLanes) {
      const Vec plain = similarity(tile, products, at, scale);
      const Vec value = kIsMasked ? plain + load_as<Vec>(tile.biases + at) : plain;
      const Vec row_gap = value - positive, column_gap = value - load_as<Vec>(tile.positives + at);
      Vec by_row, by_column = {};
      if (kIsShared) {
        const Vec power = exponential(value);
        by_row = power * factor;
        by_column = power * load_as<Vec>(tile.factors + at);
      } else {
        by_row = exponential(row_gap - loss - rest) * factor;
        if (has_columns)
          by_column =
              exponential(column_gap - load_as<Vec>(tile.losses + at) - load_as<Vec>(tile.rests + at)) *
              load_as<Vec>(tile.factors + at);
      }
      if (kIsMasked) {
        const auto excluded = no_negative(tile, at, id, place);
        by_row = excluded ? Vec{} : by_row;
        by_column = excluded ? Vec{} : by_column;
      }
      moment += by_row * (kIsMasked ? plain - (positive - bias) : row_gap) + by_column * column_gap;
      const Vec both = by_row + by_column;
      store_as(products + at - tile.begin,
               kIsScaled<A> ? both * scale * load_as<Vec>(tile.scales + at) : both);
    }
    store_as(tile.row_sums + (first + row) * A::kLanes, moment);
  }
}

// G rounded to bfloat16: neighbours in a row as one element, and neighbours in a column.
template <class A>
void round_gradients(Tile<A>& tile, int64_t rows) {
  if (rows % 2 == 1)
    for (int64_t at = 0; at < tile.end - tile.begin; ++at) tile.products[rows * kTileStride<A> + at] = 0;
  for (int64_t row = 0; row < rows; row += 2)
    for (int64_t at = 0; at < tile.end - tile.begin; at += A::kLanes) {
      const typename A::Real* even = tile.products + row * kTileStride<A> + at;
      uint32_t* across = tile.across + (row * kTileStride<A> + at) / 2;
      A::round_pairs(load_as<typename A::Vec>(even), load_as<typename A::Vec>(even + kTileStride<A>), across,
                     across + kTileStride<A> / 2, tile.down + row / 2 * kTileStride<A> + at);
    }
}

// Sums of gradients are in the second-level cache at best.
template <class A>
struct Far : A {
  static constexpr bool kIsFar = true;
};

// dA += G B and, unless the columns repeat the rows, dB += G^T A.
template <class A>
void add_gradients(const Run<A>& run, Tile<A>& tile, int64_t first, int64_t rows, Prefetch& prefetch) {
  const Side<A>&a = run.row_side, &b = run.column_side;
  const int64_t stride = a.step_stride, width = round_up(run.problem->width, A::kLanes),
                row = tile.first_row + first;
  Operand<A> across, down;
  if constexpr (kIsScaled<A>) {
    round_gradients(tile, rows);
    across = {tile.across, kTileStride<A> / 2};
    down = {tile.down, kTileStride<A>};
  } else {
    across = down = {tile.products, kTileStride<A>};
  }
  const int64_t column = tile.first_column + tile.begin,
                columns = smaller(tile.end, tile.columns) - tile.begin;
  multiply<Far<A>, false>(a.grad + row * stride, stride, {across.data, across.stride},
                          {b.steps + column / A::kPair * stride, stride}, rows, width,
                          ceil_div(columns, A::kPair), true, &prefetch);
  if (!tile.is_diagonal)
    multiply<Far<A>, true>(b.grad + column * stride, stride, {down.data, down.stride},
                           {a.steps + row / A::kPair * stride, stride}, columns, width,
                           ceil_div(rows, A::kPair), true, &prefetch);
}

template <class A>
void backward_tile(const Run<A>& run, Tile<A>& tile, TilePlace next, int64_t row_group) {
  each_part(run, tile, next, [&](int64_t first, int64_t rows, Prefetch& prefetch) {
    multiply_stripe(run, tile, first, rows, prefetch);
    if (run.is_shared)
      tile.is_masked ? gradient_stripe<A, true, true>(run, tile, first, rows)
                     : gradient_stripe<A, true, false>(run, tile, first, rows);
    else
      tile.is_masked ? gradient_stripe<A, false, true>(run, tile, first, rows)
                     : gradient_stripe<A, false, false>(run, tile, first, rows);
    add_gradients(run, tile, first, rows, prefetch);
  });
  double moment = 0;
  for (int64_t row = 0; row < tile.rows; ++row) moment += row_sum(tile, row);
  run.moments[row_group] += tile.is_diagonal ? moment / 2 : moment;  // such a tile holds each pair twice
}

// A group of rows and a group of columns, and how often each has had its turn before.
struct Meeting {
  int64_t row, column, row_turn, column_turn;
};

// The tiles of a meeting in their order; returns how many.
template <class A>
int64_t list_tiles(const Run<A>& run, const Meeting& meeting, TilePlace* places) {
  const auto blocks_of = [&](const Side<A>& side, int64_t group) {
    return smaller((group + 1) * run.group, ceil_div(side.count, run.block));
  };
  const bool is_simclr = run.problem->form == NTXentForm::kSimclr;
  int64_t count = 0;
  for (int64_t row = meeting.row * run.group; row < blocks_of(run.row_side, meeting.row); ++row) {
    const int64_t first = meeting.column * run.group;
    for (int64_t column = is_simclr ? larger(first, row) : first;
         column < blocks_of(run.column_side, meeting.column); ++column)
      places[count++] = {row, column};
  }
  return count;
}

template <class A>
void run_tiles(const Run<A>& run, const Meeting& here, const Meeting& next) {
  TilePlace places[2 * kMaxGroup * kMaxGroup];
  const int64_t count = list_tiles(run, here, places);
  if (count == 0) return;
  if (list_tiles(run, next, places + count) == 0) places[count] = {-1, -1};
  A::begin_products();
  for (int64_t at = 0; at < count; ++at) {
    Tile<A> tile;
    place_tile(run, places[at].row, places[at].column, tile);
    if (run.is_backward)
      backward_tile(run, tile, places[at + 1], here.row);
    else
      forward_tile(run, tile, places[at + 1]);
  }
  A::end_products();
}

void wait_for_turn(const int64_t& turns, int64_t turn) {
  for (int64_t tries = 0; __atomic_load_n(&turns, __ATOMIC_ACQUIRE) < turn; ++tries)
    if (tries > kTriesBeforeYield) yield_thread();
}

void end_turn(int64_t& turns, int64_t turn) { __atomic_store_n(&turns, turn + 1, __ATOMIC_RELEASE); }

template <class A>
int64_t items_of_phase(const Run<A>& run) {
  const bool is_simclr = run.problem->form == NTXentForm::kSimclr;
  return is_simclr ? (run.row_groups | 1) / 2 + 1 : smaller(run.row_groups, run.column_groups);
}

template <class A>
Meeting meeting_of(const Run<A>& run, int64_t item) {
  const int64_t items = items_of_phase(run), phase = item / items, place = item % items;
  if (run.problem->form == NTXentForm::kSimclr) {
    // Groups i and j with i + j = 2 phase modulo an odd number: each has one other, and one itself. Where the
    // number of groups is even, the last one of these has no rows.
    const int64_t odd = run.row_groups | 1, one = (phase + place) % odd, other = (phase - place + odd) % odd;
    return {smaller(one, other), larger(one, other), phase, phase};
  }
  // Groups of the shorter side meet those of the longer one in rotation; these sit out some phases.
  const bool is_tall = run.row_groups > run.column_groups;
  const int64_t rotated = (place + phase) % larger(run.row_groups, run.column_groups),
                rotated_turn = (smaller(rotated, items - 1) - place + items) % items;
  return is_tall ? Meeting{rotated, place, rotated_turn, phase}
                 : Meeting{place, rotated, phase, rotated_turn};
}

// One group of rows and one of columns, when both have had their turns in all phases before. Items are taken
// in their order, so that a thread waits for items that others are at.
template <class A>
void run_item(void* context, int64_t item, int) {
  const Run<A>& run = *static_cast<Run<A>*>(context);
  const Meeting here = meeting_of(run, item), next = meeting_of(run, item + run.problem->threads);
  if (here.row >= run.row_groups) return;
  wait_for_turn(run.row_turns[here.row], here.row_turn);
  if (here.column < run.column_groups) {
    wait_for_turn(run.column_turns[here.column], here.column_turn);
    run_tiles(run, here, next);
    end_turn(run.column_turns[here.column], here.column_turn);
  }
  end_turn(run.row_turns[here.row], here.row_turn);
}

template <class A>
void run_phases(Run<A>& run, Memory& memory) {
  const bool is_simclr = run.problem->form == NTXentForm::kSimclr;
  const int64_t more = larger(run.row_groups, run.column_groups), phases = is_simclr ? more | 1 : more;
  run.row_turns = memory.take_zeros<int64_t>(run.row_groups);
  run.column_turns = is_simclr ? run.row_turns : memory.take_zeros<int64_t>(run.column_groups);
  parallel_for(phases * items_of_phase(run), run.problem->threads, &run_item<A>, &run);
}

// Large groups read less, small ones keep more threads busy: 32 of them wherever there are 2,048 rows.
int64_t group_rows(int64_t rows) {
  const int64_t wanted = larger(smaller(rows / 32, kMaxGroup * kMaxBlock) / 64 * 64, 64);
  return wanted <= kMaxBlock ? wanted : wanted / kMaxBlock * kMaxBlock;
}

template <class A>
Side<A> make_side(const Run<A>& run, Memory& memory, int64_t first, int64_t count, bool is_column) {
  Side<A> side{};
  side.first = first;
  side.count = count;
  const int64_t padded = round_up(run.problem->width, 16);
  side.width = ceil_div(run.problem->width, A::kPair);
  // More than needed: rows a power of two apart would share few sets of the cache.
  side.step_stride = padded + 16;
  side.stride = padded / A::kPair + 16;
  const int64_t stored = stored_rows(side);
  side.rows = memory.take<typename A::Element>(stored * side.stride);
  side.steps = side.rows;
  if (is_column) side.panels = memory.take<typename A::Element>(stored * side.width);
  if (!run.is_backward) return side;
  if (kIsScaled<A>) side.steps = memory.take<typename A::Element>(stored / 2 * side.step_stride);
  if (first < run.rows) side.grad = memory.take<typename A::Real>(count * side.step_stride);
  return side;
}

template <class A>
void for_each_side(Run<A>& run, void (*task)(void*, int64_t, int)) {
  SideOfRun<A> part{&run, &run.row_side};
  parallel_for(ceil_div(run.row_side.count, kChunk), run.problem->threads, task, &part);
  if (run.problem->form == NTXentForm::kSimclr) return;
  part.side = &run.column_side;
  parallel_for(ceil_div(run.column_side.count, kChunk), run.problem->threads, task, &part);
}

template <class A>
void prepare_sides(Run<A>& run) {
  for_each_side(run, &prepare_block<A>);
  if (run.problem->positive == nullptr) return;
  SideOfRun<A> part{&run, &run.positive_side};
  parallel_for(ceil_div(run.positive_side.count, kChunk), run.problem->threads, &prepare_block<A>, &part);
}

template <class A>
void start(Run<A>& run, Memory& memory, double exponent) {
  using Real = typename A::Real;
  const NTXentProblem& problem = *run.problem;
  const bool is_simclr = problem.form == NTXentForm::kSimclr;
  run.rows = problem.left_count + problem.right_count;
  run.inverse = 1.0 / problem.temperature;
  const int64_t all = run.rows + (problem.positive == nullptr ? 0 : problem.left_count);
  run.scales = memory.take<Real>(all);
  run.column_scales = memory.take<Real>(all);
  run.stored_lengths = memory.take<double>(all);
  run.lengths = memory.take<double>(all);
  run.positives = memory.take<Real>(problem.left_count);
  run.positive_bias = memory.take<Real>(problem.left_count);
  run.row_side = make_side(run, memory, 0, is_simclr ? run.rows : problem.left_count, is_simclr);
  run.column_side =
      is_simclr ? run.row_side : make_side(run, memory, problem.left_count, problem.right_count, true);
  run.positive_side = problem.positive == nullptr
                          ? run.column_side
                          : make_side(run, memory, run.rows, problem.left_count, true);
  const int64_t rows_of_group = group_rows(smaller(run.row_side.count, run.column_side.count));
  run.block = smaller(rows_of_group, kMaxBlock);
  run.group = rows_of_group / run.block;
  run.row_groups = ceil_div(run.row_side.count, rows_of_group);
  run.column_groups = ceil_div(run.column_side.count, rows_of_group);
  prepare_sides(run);
  run.is_shared = exponent <= kLargestShared<A>;
  parallel_for(ceil_div(problem.left_count, kChunk), problem.threads, &positive_products<A>, &run);
}

// exp of one number, exactly as the tiles compute it: equal products must give equal exponentials.
template <class A>
double exponential_of(typename A::Real value) {
  return static_cast<double>(exponential(typename A::Vec{} + value)[0]);
}

template <class A>
void forward(const NTXentProblem& problem, double exponent) {
  Memory memory;
  Run<A> run{};
  run.problem = &problem;
  start(run, memory, exponent);
  const int64_t losses = problem.form == NTXentForm::kCross ? problem.left_count : run.rows;
  run.maxima = memory.take<typename A::Real>(losses);
  run.sums = memory.take_zeros<double>(losses);
  for (int64_t row = 0; row < losses; ++row) run.maxima[row] = run.positives[row % problem.left_count];
  run_phases(run, memory);
  for (int64_t row = 0; row < losses; ++row) {
    const typename A::Real positive = run.positives[row % problem.left_count];
    if (run.is_shared) {
      problem.losses[row] = std::log1p(run.sums[row] / exponential_of<A>(positive));
    } else {
      const double peak = static_cast<double>(run.maxima[row]) - static_cast<double>(positive);
      problem.losses[row] = peak + std::log1p(std::expm1(-peak) + run.sums[row]);
    }
  }
  memory.release();
}

template <class A>
void backward(const NTXentProblem& problem, double exponent) {
  Memory memory;
  Run<A> run{};
  run.problem = &problem;
  run.is_backward = true;
  start(run, memory, exponent);
  const int64_t rows = problem.form == NTXentForm::kCross ? problem.left_count : run.rows;
  run.factors = memory.take<typename A::Real>(rows);
  run.moments = memory.take_zeros<double>(run.row_groups);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t pair = row % problem.left_count;
    double factor = static_cast<double>(problem.weight[row]);
    if (run.is_shared) factor *= std::exp(-problem.losses[row]) / exponential_of<A>(run.positives[pair]);
    run.factors[row] = static_cast<typename A::Real>(factor);
  }
  run_phases(run, memory);
  double moment = 0;
  for (int64_t group = 0; group < run.row_groups; ++group) moment += run.moments[group];
  *problem.moment = moment;
  for_each_side(run, &finish_block<A>);
  memory.release();
}

bool is_small(const NTXentProblem& problem) {
  const bool is_simclr = problem.form == NTXentForm::kSimclr;
  const int64_t rows = is_simclr ? 2 * problem.left_count : problem.left_count,
                columns = is_simclr ? rows : problem.right_count;
  return rows <= kExactOperations / columns / problem.width;
}

template <bool kIsBackward>
void run(const NTXentProblem& problem) {
  const double exponent = largest_exponent(problem);
  const auto with = [&](auto arithmetic) {
    using A = decltype(arithmetic);
    kIsBackward ? backward<A>(problem, exponent) : forward<A>(problem, exponent);
  };
  if (is_small(problem)) return with(DoubleArithmetic{});
#if defined(UBP_HAS_PAIRS)
  if (problem.dtype == DType::kBFloat16) return with(BFloat16Arithmetic{});
#endif
  if (exponent <= kLargestShared<FloatArithmetic>) return with(FloatArithmetic{});
  with(DoubleArithmetic{});
}

}  // namespace

namespace UBP_ISA_NAMESPACE {

void nt_xent_forward(const NTXentProblem& problem) { run<false>(problem); }
void nt_xent_backward(const NTXentProblem& problem) { run<true>(problem); }

}  // namespace UBP_ISA_NAMESPACE
}  // namespace ubp
