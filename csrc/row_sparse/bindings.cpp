// row_sparse for Python: tensors as addresses and sizes, the checks that keep a wrong caller from crashing
// the process, and the GIL released while a kernel runs.
#include "row_sparse/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "row_sparse/group.h"

namespace py = pybind11;

namespace ubp {
namespace {

using Address = uintptr_t;
using TableAddresses = std::array<Address, 5>;  // weight, state, slot, last_step, retained or history
using TableSizes = std::array<int64_t, 4>;      // rows, width, steps up to the present, slots

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("row_sparse: " + message);
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Table>
Table make_table(const TableAddresses& addresses, const TableSizes& sizes) {
  require(sizes[0] >= 0 && sizes[1] >= 0, "sizes must not be negative");
  require(sizes[2] >= 0 && sizes[2] < INT32_MAX,
          "steps must be in 0..2^31 - 2, got " + std::to_string(sizes[2]));
  return {pointer<float>(addresses[0]),
          pointer<float>(addresses[1]),
          pointer<int32_t>(addresses[2]),
          pointer<int32_t>(addresses[3]),
          pointer<double>(addresses[4]),
          sizes[0],
          sizes[1],
          sizes[2]};
}

// Memory is read and written at these places.
template <class Table>
void check_row(int64_t id, const Table& table, int64_t slots) {
  const int32_t last = table.last_step[id];
  if (last < 0) return;
  require(last <= table.now, "last_step must not lie in the future, got " + std::to_string(last) +
                                 " at step " + std::to_string(table.now));
  require(table.slot[id] >= 0 && table.slot[id] < slots, "slots of touched rows must lie in 0.." +
                                                             std::to_string(slots - 1) + ", got " +
                                                             std::to_string(table.slot[id]));
}

template <class Table>
void check_ids(const int64_t* ids, int64_t count, const Table& table, int64_t slots) {
  for (int64_t t = 0; t < count; ++t) {
    if (ids[t] < 0 || ids[t] >= table.rows)
      throw py::index_error("row_sparse: ids must lie in 0.." + std::to_string(table.rows - 1) + ", got " +
                            std::to_string(ids[t]) + " at entry " + std::to_string(t));
    check_row(ids[t], table, slots);
  }
}

// Two threads must never write one row.
void check_ascending(const int64_t* ids, int64_t count) {
  for (int64_t u = 1; u < count; ++u)
    require(ids[u] > ids[u - 1], "ids of an update must ascend, got " + std::to_string(ids[u - 1]) +
                                     " then " + std::to_string(ids[u]));
}

// Rows with their first gradient take the next free slots.
template <class Table>
void give_slots(const int64_t* ids, int64_t count, const Table& table, int64_t slots, int64_t* used) {
  require(*used >= 0, "used must not be negative");
  for (int64_t u = 0; u < count; ++u) {
    if (table.last_step[ids[u]] >= 0) continue;
    require(*used < slots, "state must have a slot for every touched row, got " + std::to_string(slots));
    table.slot[ids[u]] = static_cast<int32_t>((*used)++);
  }
}

void gather(const TableAddresses& addresses, const TableSizes& sizes, Address ids, int64_t count,
            Address output, int threads) {
  const RowSparseGather problem{make_table<ScheduleFreeRows>(addresses, sizes), pointer<int64_t>(ids), count,
                                pointer<float>(output), threads};
  check_ids(problem.ids, count, problem.table, sizes[3]);
  py::gil_scoped_release released;
  kernels().row_sparse_gather(problem);
}

int64_t group(Address ids, int64_t count, Address order, Address distinct, Address start) {
  for (int64_t t = 0; t < count; ++t)
    if (pointer<int64_t>(ids)[t] < 0)
      throw py::index_error("row_sparse: ids must not be negative, got " +
                            std::to_string(pointer<int64_t>(ids)[t]));
  py::gil_scoped_release released;
  return group_ids(pointer<int64_t>(ids), count, pointer<int64_t>(order), pointer<int64_t>(distinct),
                   pointer<int64_t>(start));
}

void reduce(Address start, Address order, const std::array<int64_t, 3>& sizes, Address gradient, Address sums,
            int threads) {
  const RowSparseReduce problem{
      pointer<int64_t>(start),  pointer<int64_t>(order), sizes[0], sizes[1], sizes[2],
      pointer<float>(gradient), pointer<float>(sums),    threads};
  py::gil_scoped_release released;
  kernels().row_sparse_reduce(problem);
}

void update(const TableAddresses& addresses, const TableSizes& sizes, Address ids, int64_t count,
            Address gradient, const std::array<double, 6>& step, bool is_adaptive, Address used,
            int threads) {
  RowSparseUpdate problem{};
  problem.table = make_table<ScheduleFreeRows>(addresses, sizes);
  problem.ids = pointer<int64_t>(ids);
  problem.count = count;
  problem.gradient = pointer<float>(gradient);
  problem.learning_rate = static_cast<float>(step[0]);
  problem.average_weight = static_cast<float>(step[1]);
  problem.gradient_weight = static_cast<float>(step[2]);
  problem.beta2 = step[3];
  problem.bias_correction = static_cast<float>(step[4]);
  problem.eps = static_cast<float>(step[5]);
  problem.is_adaptive = is_adaptive;
  problem.threads = threads;
  check_ids(problem.ids, count, problem.table, sizes[3]);
  check_ascending(problem.ids, count);
  give_slots(problem.ids, count, problem.table, sizes[3], pointer<int64_t>(used));
  py::gil_scoped_release released;
  kernels().row_sparse_update(problem);
}

void catch_up(const TableAddresses& addresses, const TableSizes& sizes, double beta2, double toward_z,
              int threads) {
  const RowSparseCatchUp problem{make_table<ScheduleFreeRows>(addresses, sizes), beta2,
                                 static_cast<float>(toward_z), threads};
  for (int64_t row = 0; row < problem.table.rows; ++row) check_row(row, problem.table, sizes[3]);
  py::gil_scoped_release released;
  kernels().row_sparse_catch_up(problem);
}

using AdamNumbers = std::array<double, 3>;  // beta1, beta2, eps

// The numbers that a dense optimizer in float32 multiplies by, and what the history says about every step.
AdamRule make_rule(const AdamNumbers& numbers, const AdamRows& table, std::vector<AdamTail>& tails) {
  require(0.0 <= numbers[0] && numbers[0] < 1.0 && 0.0 < numbers[1] && numbers[1] < 1.0 && numbers[2] > 0.0,
          "beta1 must lie in [0, 1), beta2 in (0, 1) and eps above 0, got " + std::to_string(numbers[0]) +
              ", " + std::to_string(numbers[1]) + ", " + std::to_string(numbers[2]));
  const float first_new = static_cast<float>(1.0 - numbers[0]);
  const float second_new = static_cast<float>(1.0 - numbers[1]);
  AdamRule rule{1.0 - static_cast<double>(first_new),
                static_cast<float>(numbers[1]),
                numbers[2],
                first_new,
                second_new,
                0,
                nullptr};
  tails.resize(table.now + 1);
  rule.horizon = adam_tails(table.history, table.now, rule.beta1, rule.beta2, rule.eps, tails.data());
  rule.tails = tails.data();
  return rule;
}

void adam_gather(const TableAddresses& addresses, const TableSizes& sizes, const AdamNumbers& numbers,
                 Address ids, int64_t count, Address output, int threads) {
  const AdamRows table = make_table<AdamRows>(addresses, sizes);
  check_ids(pointer<int64_t>(ids), count, table, sizes[3]);
  std::vector<AdamTail> tails;
  const AdamRule rule = make_rule(numbers, table, tails);
  py::gil_scoped_release released;
  kernels().row_sparse_adam_gather(
      {table, rule, pointer<int64_t>(ids), count, pointer<float>(output), threads});
}

void adam_update(const TableAddresses& addresses, const TableSizes& sizes, const AdamNumbers& numbers,
                 Address ids, int64_t count, Address gradient, const std::array<double, 3>& step,
                 Address used, int threads) {
  const AdamRows table = make_table<AdamRows>(addresses, sizes);
  check_ids(pointer<int64_t>(ids), count, table, sizes[3]);
  check_ascending(pointer<int64_t>(ids), count);
  std::vector<AdamTail> tails;
  const AdamRule rule = make_rule(numbers, table, tails);
  give_slots(pointer<int64_t>(ids), count, table, sizes[3], pointer<int64_t>(used));
  py::gil_scoped_release released;
  kernels().row_sparse_adam_update({table, rule, pointer<int64_t>(ids), count, pointer<float>(gradient),
                                    static_cast<float>(step[0]), static_cast<float>(step[1]),
                                    static_cast<float>(step[2]), threads});
}

void adam_catch_up(const TableAddresses& addresses, const TableSizes& sizes, const AdamNumbers& numbers,
                   int threads) {
  const AdamRows table = make_table<AdamRows>(addresses, sizes);
  for (int64_t row = 0; row < table.rows; ++row) check_row(row, table, sizes[3]);
  std::vector<AdamTail> tails;
  const AdamRule rule = make_rule(numbers, table, tails);
  py::gil_scoped_release released;
  kernels().row_sparse_adam_catch_up({table, rule, threads});
}

}  // namespace

void bind_row_sparse(py::module_& module) {
  module.def("row_sparse_gather", &gather);
  module.def("row_sparse_group", &group);
  module.def("row_sparse_reduce", &reduce);
  module.def("row_sparse_update", &update);
  module.def("row_sparse_catch_up", &catch_up);
  module.def("row_sparse_adam_gather", &adam_gather);
  module.def("row_sparse_adam_update", &adam_update);
  module.def("row_sparse_adam_catch_up", &adam_catch_up);
}

}  // namespace ubp
