// row_sparse for Python: structs with the kernels' own field names, the checks that keep a wrong caller from
// crashing the process, and the GIL released while a kernel runs.
#include "common/bindings.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "common/dispatch.h"

namespace py = pybind11;

namespace ubp {
void bind_row_sparse(py::module_& module);

namespace {

// Messages are made where there is something to say: checks of single rows cost a few cycles.
template <class Message>
void require(bool condition, const Message& message) {
  if (!condition) throw std::invalid_argument("row_sparse: " + std::string(message()));
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The rule with what the table's history says about every step.
ScheduleFree with_history(const ScheduleFree& rule, const RowTable&, std::vector<AdamTail>&) { return rule; }

Adam with_history(Adam rule, const RowTable& table, std::vector<AdamTail>& tails) {
  require(0.0 <= rule.beta1 && rule.beta1 < 1.0 && 0.0 < rule.beta2 && rule.beta2 < 1.0 && rule.eps > 0.0,
          [&] {
            return "beta1 must lie in [0, 1), beta2 in (0, 1) and eps above 0, got " +
                   std::to_string(rule.beta1) + ", " + std::to_string(rule.beta2) + ", " +
                   std::to_string(rule.eps);
          });
  // The numbers that a dense optimizer in float32 multiplies by.
  rule.first_new = static_cast<float>(1.0 - rule.beta1);
  rule.second_new = static_cast<float>(1.0 - rule.beta2);
  rule.beta1 = 1.0 - static_cast<double>(rule.first_new);
  rule.beta2 = static_cast<float>(rule.beta2);
  tails.resize(table.now + 1);
  rule.horizon = adam_tails(table.history, table.now, rule.beta1, rule.beta2, rule.eps, tails.data());
  rule.tails = tails.data();
  return rule;
}

void check_table(const RowTable& table) {
  require(table.rows >= 0 && table.width >= 0 && table.slots >= 0,
          [&] { return "sizes must not be negative"; });
  require(table.now >= 0 && table.now < INT32_MAX,
          [&] { return "steps must be in 0..2^31 - 2, got " + std::to_string(table.now); });
}

// Memory is read and written at these places.
void check_row(int64_t id, const RowTable& table) {
  const int32_t last = table.last_step[id];
  if (last < 0) return;
  require(last <= table.now, [&] {
    return "last_step must not lie in the future, got " + std::to_string(last) + " at step " +
           std::to_string(table.now);
  });
  require(table.slot[id] >= 0 && table.slot[id] < table.slots, [&] {
    return "slots of touched rows must lie in 0.." + std::to_string(table.slots - 1) + ", got " +
           std::to_string(table.slot[id]);
  });
}

void check_ids(const int64_t* ids, int64_t count, const RowTable& table) {
  check_table(table);
  for (int64_t t = 0; t < count; ++t) {
    if (ids[t] < 0 || ids[t] >= table.rows)
      throw py::index_error("row_sparse: ids must lie in 0.." + std::to_string(table.rows - 1) + ", got " +
                            std::to_string(ids[t]) + " at entry " + std::to_string(t));
    check_row(ids[t], table);
  }
}

// Two threads must never write one row.
void check_ascending(const int64_t* ids, int64_t count) {
  for (int64_t u = 1; u < count; ++u)
    require(ids[u] > ids[u - 1], [&] {
      return "ids of an update must ascend, got " + std::to_string(ids[u - 1]) + " then " +
             std::to_string(ids[u]);
    });
}

// Rows with their first gradient take the next free slots.
void give_slots(const int64_t* ids, int64_t count, const RowTable& table) {
  require(*table.used >= 0, [&] { return "used must not be negative"; });
  for (int64_t u = 0; u < count; ++u) {
    if (table.last_step[ids[u]] >= 0) continue;
    require(*table.used < table.slots, [&] {
      return "state must have a slot for every touched row, got " + std::to_string(table.slots);
    });
    table.slot[ids[u]] = static_cast<int32_t>((*table.used)++);
  }
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

void reduce(Address start, Address order, int64_t groups, int64_t width, int64_t stride, Address gradient,
            Address sums, int threads) {
  const RowSparseReduce problem{pointer<int64_t>(start),  pointer<int64_t>(order), groups, width, stride,
                                pointer<float>(gradient), pointer<float>(sums),    threads};
  py::gil_scoped_release released;
  kernels().row_sparse.reduce(problem);
}

template <class Rule, RowSparseRuleKernels<Rule> RowSparseKernels::* kKernels>
void bind_rule(py::module_& module) {
  module.def("row_sparse_gather", [](const RowTable& table, const Rule& rule, Address ids, int64_t count,
                                     Address output, int threads) {
    check_ids(pointer<int64_t>(ids), count, table);
    std::vector<AdamTail> tails;
    const Rule known = with_history(rule, table, tails);
    py::gil_scoped_release released;
    (kernels().row_sparse.*kKernels)
        .gather({table, known, pointer<int64_t>(ids), count, pointer<float>(output), threads});
  });
  module.def("row_sparse_update", [](const RowTable& table, const Rule& rule, const typename Rule::Step& step,
                                     Address ids, int64_t count, Address gradient, int threads) {
    check_ids(pointer<int64_t>(ids), count, table);
    check_ascending(pointer<int64_t>(ids), count);
    std::vector<AdamTail> tails;
    const Rule known = with_history(rule, table, tails);
    give_slots(pointer<int64_t>(ids), count, table);
    py::gil_scoped_release released;
    (kernels().row_sparse.*kKernels)
        .update({table, known, step, pointer<int64_t>(ids), count, pointer<float>(gradient), threads});
  });
  module.def("row_sparse_catch_up", [](const RowTable& table, const Rule& rule, int threads) {
    check_table(table);
    for (int64_t row = 0; row < table.rows; ++row) check_row(row, table);
    std::vector<AdamTail> tails;
    const Rule known = with_history(rule, table, tails);
    py::gil_scoped_release released;
    (kernels().row_sparse.*kKernels).catch_up({table, known, threads});
  });
}

}  // namespace

void bind_row_sparse(py::module_& module) {
  Struct<RowTable>(module, "RowTable")
      .fields("weight", &RowTable::weight, "state", &RowTable::state, "slot", &RowTable::slot, "last_step",
              &RowTable::last_step, "history", &RowTable::history, "used", &RowTable::used, "rows",
              &RowTable::rows, "width", &RowTable::width, "now", &RowTable::now, "slots", &RowTable::slots);
  Struct<ScheduleFree>(module, "ScheduleFree")
      .fields("beta2", &ScheduleFree::beta2, "eps", &ScheduleFree::eps, "toward_z", &ScheduleFree::toward_z);
  Struct<ScheduleFree::Step>(module, "ScheduleFreeStep")
      .fields("learning_rate", &ScheduleFree::Step::learning_rate, "average_weight",
              &ScheduleFree::Step::average_weight, "gradient_weight", &ScheduleFree::Step::gradient_weight,
              "bias_correction", &ScheduleFree::Step::bias_correction, "is_adaptive",
              &ScheduleFree::Step::is_adaptive);
  Struct<Adam>(module, "Adam").fields("beta1", &Adam::beta1, "beta2", &Adam::beta2, "eps", &Adam::eps);
  Struct<Adam::Step>(module, "AdamStep")
      .fields("rate", &Adam::Step::rate, "root", &Adam::Step::root, "keep", &Adam::Step::keep);
  module.def("row_sparse_group", &group);
  module.def("row_sparse_reduce", &reduce);
  bind_rule<ScheduleFree, &RowSparseKernels::schedule_free>(module);
  bind_rule<Adam, &RowSparseKernels::adam>(module);
}

}  // namespace ubp
