#include "common/dispatch.h"

#include <atomic>
#include <stdexcept>
#if UBP_ARM64
#include <sys/auxv.h>
#endif

namespace ubp {

#define UBP_DECLARE(isa)                                         \
  namespace isa_##isa {                                          \
    void flash_attention_forward(const FlashAttentionProblem&);  \
    void flash_attention_backward(const FlashAttentionProblem&); \
    void nt_xent_forward(const NTXentProblem&);                  \
    void nt_xent_backward(const NTXentProblem&);                 \
    RowProductKernels row_product();                             \
    RowSparseKernels row_sparse();                               \
  }
#define UBP_ENTRY(isa)                                                                       \
  Kernels {                                                                                  \
    #isa, &isa_##isa::flash_attention_forward, &isa_##isa::flash_attention_backward,         \
        &isa_##isa::nt_xent_forward, &isa_##isa::nt_xent_backward, isa_##isa::row_product(), \
        isa_##isa::row_sparse()                                                              \
  }

UBP_DECLARE(base)
#if UBP_X86
UBP_DECLARE(avx2)
UBP_DECLARE(avx512)
UBP_DECLARE(avx512_bf16)
#elif UBP_ARM64
UBP_DECLARE(neon_bf16)
#endif

namespace {

const Kernels kTable[] = {
    UBP_ENTRY(base),
#if UBP_X86
    UBP_ENTRY(avx2),
    UBP_ENTRY(avx512),
    UBP_ENTRY(avx512_bf16),
#elif UBP_ARM64
    UBP_ENTRY(neon_bf16),
#endif
};

bool is_supported(const std::string& isa) {
  if (isa == "base") return true;
#if UBP_X86
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#elif UBP_ARM64
  constexpr unsigned long kHasBFloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
  if (isa == "neon_bf16") return (getauxval(AT_HWCAP2) & kHasBFloat16) != 0;
#endif
  return false;
}

const Kernels* best() {
  const Kernels* found = &kTable[0];
  for (const Kernels& entry : kTable)
    if (is_supported(entry.isa)) found = &entry;
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{best()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(); }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Kernels& entry : kTable)
    if (is_supported(entry.isa)) names.emplace_back(entry.isa);
  return names;
}

void set_isa(const std::string& name) {
  for (const Kernels& entry : kTable) {
    if (name != entry.isa) continue;
    if (!is_supported(name))
      throw std::invalid_argument("set_isa: name must be an instruction set of this machine, got '" + name +
                                  "', which its processor lacks");
    current().store(&entry);
    return;
  }
  throw std::invalid_argument("set_isa: name must be an instruction set of this build, got '" + name + "'");
}

}  // namespace ubp
