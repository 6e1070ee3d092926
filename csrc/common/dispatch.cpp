#include "common/dispatch.h"

#include <atomic>
#include <stdexcept>
#if UBP_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif UBP_ARM64
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
UBP_DECLARE(amx_bf16)
#if UBP_EMULATED_AMX
UBP_DECLARE(amx_emulated)
#endif
#elif UBP_ARM64
UBP_DECLARE(neon_bf16)
#endif

namespace {

const Kernels kTable[] = {
    UBP_ENTRY(base),
#if UBP_X86
#if UBP_EMULATED_AMX
    UBP_ENTRY(amx_emulated),
#endif
    UBP_ENTRY(avx2),         UBP_ENTRY(avx512), UBP_ENTRY(avx512_bf16), UBP_ENTRY(amx_bf16),
#elif UBP_ARM64
    UBP_ENTRY(neon_bf16),
#endif
};

const char* const kLacking = "which its processor lacks";

#if UBP_X86
struct Registers {
  unsigned eax, ebx, ecx, edx;
};

// Zeros where the processor has no such leaf.
Registers cpuid(unsigned leaf) {
  Registers found{};
  __get_cpuid_count(leaf, 0, &found.eax, &found.ebx, &found.ecx, &found.edx);
  return found;
}

// Linux hands out the tile registers to processes that ask, and saves them for all of their threads from then
// on. Nothing is asked where the processor has none.
bool are_tiles_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool is_granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_granted;
}
#endif

// Why this machine cannot run the kernels of an instruction set; null: it can.
const char* obstacle(const std::string& isa) {
  if (isa == "base") return nullptr;
#if UBP_X86
  __builtin_cpu_init();
  bool is_there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  (cpuid(1).ecx & 1u << 29) != 0;  // F16C, which not every compiler knows by name
  if (isa != "avx2")
    is_there = is_there && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa != "avx2" && isa != "avx512") is_there = is_there && __builtin_cpu_supports("avx512bf16");
  if (isa != "amx_bf16") return is_there ? nullptr : kLacking;
  constexpr unsigned kTilesAndBFloat16 = 1u << 24 | 1u << 22;
  if (!is_there || (cpuid(7).edx & kTilesAndBFloat16) != kTilesAndBFloat16) return kLacking;
  return are_tiles_granted() ? nullptr : "whose tile registers its operating system keeps";
#elif UBP_ARM64
  constexpr unsigned long kHasBFloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
  if (isa == "neon_bf16" && (getauxval(AT_HWCAP2) & kHasBFloat16) != 0) return nullptr;
#endif
  return kLacking;
}

const Kernels* best() {
  const Kernels* found = &kTable[0];
  for (const Kernels& entry : kTable)
    if (obstacle(entry.isa) == nullptr) found = &entry;
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
    if (obstacle(entry.isa) == nullptr) names.emplace_back(entry.isa);
  return names;
}

void set_isa(const std::string& name) {
  for (const Kernels& entry : kTable) {
    if (name != entry.isa) continue;
    if (const char* reason = obstacle(name))
      throw std::invalid_argument("set_isa: name must be an instruction set of this machine, got '" + name +
                                  "', " + reason);
    current().store(&entry);
    return;
  }
  throw std::invalid_argument("set_isa: name must be an instruction set of this build, got '" + name + "'");
}

}  // namespace ubp
