#pragma once

#include <pybind11/pybind11.h>

namespace ubp {

// Adds the row_sparse functions to the module.
void bind_row_sparse(pybind11::module_& module);

}  // namespace ubp
