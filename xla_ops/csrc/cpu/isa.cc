// Picks the instruction set that the vectorised kernels run with. setup.py defines XLA_OPS_X86_VARIANTS
// where it compiled kernels.cc for AVX2 and AVX-512 beside the baseline (SSE2 on x86-64, NEON on arm64).

#include <atomic>
#include <cstring>

#include "kernels.h"

namespace xla_ops {

extern const Isa isa_baseline;
#ifdef XLA_OPS_X86_VARIANTS
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#endif

namespace {

const Isa* find(const char* name) {  // a null name finds the best
#ifdef XLA_OPS_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (!name || !std::strcmp(name, "avx512"))) return &isa_avx512;
  if (avx2 && (!name || !std::strcmp(name, "avx2"))) return &isa_avx2;
#endif
  return !name || !std::strcmp(name, "baseline") ? &isa_baseline : nullptr;
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{find(nullptr)};
  return isa;
}

}  // namespace

const Isa& isa() { return *selected().load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
  const Isa* found = find(name);
  if (found) selected().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace xla_ops
