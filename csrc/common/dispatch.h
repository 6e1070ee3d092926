// Run-time choice of the instruction set: every kernel exists once per set, in namespace ubp::isa_<name>.
#pragma once

#include <string>
#include <vector>

#include "flash_attention/flash_attention.h"
#include "nt_xent/nt_xent.h"
#include "row_product/row_product.h"
#include "row_sparse/row_sparse.h"

namespace ubp {

struct Kernels {
  const char* isa;
  FlashAttentionFunction flash_attention_forward, flash_attention_backward;
  NTXentFunction nt_xent_forward, nt_xent_backward;
  RowProductKernels row_product;
  RowSparseKernels row_sparse;
};

// The kernels in use; at first those of the best instruction set of this machine.
const Kernels& kernels();

// Instruction sets that this build has and this machine can run, worst first.
std::vector<std::string> usable_isas();

// Uses the named set from now on. Throws std::invalid_argument with the reason when it cannot be used.
void set_isa(const std::string& name);

}  // namespace ubp
