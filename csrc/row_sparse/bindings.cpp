// row_sparse for Python: tensors as addresses and sizes, the checks that keep a wrong caller from crashing
// the process, and the GIL released while a kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/dispatch.h"

namespace py = pybind11;

namespace ubp {
void bind_row_sparse(py::module_& module);

namespace {

using Address = uintptr_t;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("row_sparse: " + message);
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

RowTable make_table(Address weight, Address state, Address slot, Address last_step, Address history,
                    Address used, int64_t rows, int64_t width, int64_t slots, int64_t steps) {
  require(rows >= 0 && width >= 0 && slots >= 0, "sizes must not be negative");
  require(steps >= 0 && steps < INT32_MAX, "steps must be in 0..2^31 - 2, got " + std::to_string(steps));
  return {pointer<float>(weight),
          pointer<float>(state),
          pointer<int32_t>(slot),
          pointer<int32_t>(last_step),
          pointer<double>(history),
          pointer<int64_t>(used),
          rows,
          width,
          steps,
          slots};
}

// The numbers that a dense optimizer in float32 multiplies by.
Adam make_adam(double beta1, double beta2, double eps) {
  require(0.0 <= beta1 && beta1 < 1.0 && 0.0 < beta2 && beta2 < 1.0 && eps > 0.0,
          "beta1 must lie in [0, 1), beta2 in (0, 1) and eps above 0, got " + std::to_string(beta1) + ", " +
              std::to_string(beta2) + ", " + std::to_string(eps));
  const float first_new = static_cast<float>(1.0 - beta1), second_new = static_cast<float>(1.0 - beta2);
  return {1.0 - static_cast<double>(first_new),
          static_cast<float>(beta2),
          eps,
          first_new,
          second_new,
          0,
          nullptr};
}

// The rule with what the table's history says about every step.
ScheduleFree with_history(const ScheduleFree& rule, const RowTable&, std::vector<AdamTail>&) { return rule; }

Adam with_history(Adam rule, const RowTable& table, std::vector<AdamTail>& tails) {
  tails.resize(table.now + 1);
  rule.horizon = adam_tails(table.history, table.now, rule.beta1, rule.beta2, rule.eps, tails.data());
  rule.tails = tails.data();
  return rule;
}

// Memory is read and written at these places.
void check_row(int64_t id, const RowTable& table) {
  const int32_t last = table.last_step[id];
  if (last < 0) return;
  require(last <= table.now, "last_step must not lie in the future, got " + std::to_string(last) +
                                 " at step " + std::to_string(table.now));
  require(table.slot[id] >= 0 && table.slot[id] < table.slots, "slots of touched rows must lie in 0.." +
                                                                   std::to_string(table.slots - 1) +
                                                                   ", got " + std::to_string(table.slot[id]));
}

void check_ids(const int64_t* ids, int64_t count, const RowTable& table) {
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
    require(ids[u] > ids[u - 1], "ids of an update must ascend, got " + std::to_string(ids[u - 1]) +
                                     " then " + std::to_string(ids[u]));
}

// Rows with their first gradient take the next free slots.
void give_slots(const int64_t* ids, int64_t count, const RowTable& table) {
  require(*table.used >= 0, "used must not be negative");
  for (int64_t u = 0; u < count; ++u) {
    if (table.last_step[ids[u]] >= 0) continue;
    require(*table.used < table.slots,
            "state must have a slot for every touched row, got " + std::to_string(table.slots));
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
    for (int64_t row = 0; row < table.rows; ++row) check_row(row, table);
    std::vector<AdamTail> tails;
    const Rule known = with_history(rule, table, tails);
    py::gil_scoped_release released;
    (kernels().row_sparse.*kKernels).catch_up({table, known, threads});
  });
}

}  // namespace

void bind_row_sparse(py::module_& module) {
  py::class_<RowTable>(module, "RowTable")
      .def(py::init(&make_table), py::kw_only(), py::arg("weight"), py::arg("state"), py::arg("slot"),
           py::arg("last_step"), py::arg("history"), py::arg("used"), py::arg("rows"), py::arg("width"),
           py::arg("slots"), py::arg("steps"));
  py::class_<ScheduleFree>(module, "ScheduleFree")
      .def(py::init(
               [](double beta2, float eps, float toward_z) { return ScheduleFree{beta2, eps, toward_z}; }),
           py::kw_only(), py::arg("beta2"), py::arg("eps"), py::arg("toward_z"));
  py::class_<ScheduleFree::Step>(module, "ScheduleFreeStep")
      .def(py::init([](float learning_rate, float average_weight, float gradient_weight,
                       float bias_correction, bool is_adaptive) {
             return ScheduleFree::Step{learning_rate, average_weight, gradient_weight, bias_correction,
                                       is_adaptive};
           }),
           py::kw_only(), py::arg("learning_rate"), py::arg("average_weight"), py::arg("gradient_weight"),
           py::arg("bias_correction"), py::arg("is_adaptive"));
  py::class_<Adam>(module, "Adam")
      .def(py::init(&make_adam), py::kw_only(), py::arg("beta1"), py::arg("beta2"), py::arg("eps"));
  py::class_<Adam::Step>(module, "AdamStep")
      .def(py::init([](float rate, float root, float keep) { return Adam::Step{rate, root, keep}; }),
           py::kw_only(), py::arg("rate"), py::arg("root"), py::arg("keep"));
  module.def("row_sparse_group", &group);
  module.def("row_sparse_reduce", &reduce);
  bind_rule<ScheduleFree, &RowSparseKernels::schedule_free>(module);
  bind_rule<Adam, &RowSparseKernels::adam>(module);
}

}  // namespace ubp
