// A model of nt_xent's schedule: the kernel's own items, each as long as its products, on as many threads as
// asked for. Without Python; test_nt_xent_native.py compiles and runs it.
//
// Arguments: form, pairs, columns, threads. Prints how many times as fast as one thread they are. Ends with 1
// where two items would write to the same rows at once, or one would wait for another that comes later.
#define UBP_ISA model
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

#include "nt_xent/cpu.cpp"

namespace {

using A = ubp::FloatArithmetic;

[[noreturn]] void fail(const char* what, int64_t item) {
  std::fprintf(stderr, "item %lld: %s\n", static_cast<long long>(item), what);
  std::exit(1);
}

// Products of pairs of rows; a tile on the diagonal adds to its rows only.
double cost_of(const ubp::Run<A>& run, const ubp::Meeting& meeting) {
  ubp::TilePlace places[ubp::kMaxGroup * ubp::kMaxGroup];
  double products = 0;
  for (int64_t at = ubp::list_tiles(run, meeting, places); at-- > 0;) {
    ubp::Tile<A> tile;
    ubp::place_tile(run, places[at].row, places[at].column, tile);
    products += static_cast<double>(tile.rows * tile.columns) * (tile.is_diagonal ? 2 : 3);
  }
  return products;
}

// Who is free takes the next item, and begins when its groups have had their turns before.
void simulate(const ubp::Run<A>& run, int64_t items, int threads) {
  std::vector<double> free_at(threads);
  std::map<const int64_t*, std::pair<int64_t, double>> groups;  // turns that have begun, end of the last one
  double all = 0;
  for (int64_t item = 0; item < items; ++item) {
    const ubp::Meeting here = ubp::meeting_of(run, item);
    if (here.row >= run.row_groups) continue;
    const bool is_met = here.column < run.column_groups;
    const int64_t* const row = run.row_turns + here.row;
    const int64_t* const column = is_met ? run.column_turns + here.column : row;
    if (groups[row].first != here.row_turn) fail("its rows have another turn", item);
    if (groups[column].first != (is_met ? here.column_turn : here.row_turn)) fail("its columns have", item);
    const double cost = is_met ? cost_of(run, here) : 0;
    double& free = *std::min_element(free_at.begin(), free_at.end());
    free = std::max({free, groups[row].second, groups[column].second}) + cost;
    all += cost;
    groups[row] = {here.row_turn + 1, free};
    if (column != row) groups[column] = {here.column_turn + 1, free};
  }
  const double rows = static_cast<double>(run.row_side.count),
               columns = static_cast<double>(run.column_side.count);
  const bool is_simclr = run.problem->form == ubp::NTXentForm::kSimclr;
  if (all < (is_simclr ? 1.5 : 3.0) * rows * columns) fail("pairs are left out before", items);
  std::printf("%.3f\n", all / *std::max_element(free_at.begin(), free_at.end()));
}

}  // namespace

namespace ubp {

// Nothing is computed: only the items of the tiles count.
void parallel_for(int64_t items, int threads, void (*task)(void*, int64_t, int), void* context) {
  if (task == &run_item<A>) simulate(*static_cast<Run<A>*>(context), items, threads);
}
void yield_thread() {}
void throw_out_of_memory() { std::abort(); }

}  // namespace ubp

int main(int, char** arguments) {
  ubp::NTXentProblem problem{};
  problem.form = static_cast<ubp::NTXentForm>(std::atoi(arguments[1]));
  problem.left_count = problem.right_count = problem.left_rows = problem.right_rows = std::atoi(arguments[2]);
  problem.width = std::atoi(arguments[3]);
  problem.threads = std::atoi(arguments[4]);
  problem.temperature = 0.1;
  std::vector<int32_t> ids(problem.left_count);
  for (size_t row = 0; row < ids.size(); ++row) ids[row] = static_cast<int32_t>(row);
  problem.left_ids = problem.right_ids = ids.data();
  std::vector<double> losses(2 * ids.size());
  problem.losses = losses.data();
  ubp::Memory memory;
  ubp::Run<A> run{};
  run.problem = &problem;
  run.is_backward = true;
  ubp::start(run, memory, 10.0);
  run.factors = memory.take_zeros<float>(run.rows);
  ubp::run_phases(run, memory);
  memory.release();
}
