#include "core/cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if FEDMAP_X86
#include <cpuid.h>
#endif

namespace fedmap {
namespace {

constexpr Isa kLevels[] = {Isa::scalar, Isa::avx2, Isa::avx512};

#if FEDMAP_X86
// cpuid by hand: __builtin_cpu_supports of clang 14 does not know all of the names needed.
Isa detect() {
  auto has = [](unsigned word, std::initializer_list<int> bits) {
    for (int bit : bits)
      if (!(word >> bit & 1))
        return false;
    return true;
  };
  unsigned a, b1, c1, d1, b7, c7, d7, bx, cx, dx;
  if (!__get_cpuid(1, &a, &b1, &c1, &d1) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) ||
      !__get_cpuid(0x80000001, &a, &bx, &cx, &dx))
    return Isa::scalar;
  // pclmul, sse4.2, popcnt, osxsave, avx, f16c
  if (!has(c1, {1, 20, 23, 27, 28, 29}))
    return Isa::scalar;
  unsigned enabled, high;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  // The system saves xmm and ymm; bmi1, avx2, bmi2; lzcnt.
  if ((enabled & 0x6) != 0x6 || !has(b7, {3, 5, 8}) || !has(cx, {5}))
    return Isa::scalar;
  // The system saves opmask and zmm; avx512 f, dq, cd, bw, vl; vbmi, vbmi2, vpclmulqdq, bitalg,
  // vpopcntdq.
  if ((enabled & 0xe0) != 0xe0 || !has(b7, {16, 17, 28, 30, 31}) || !has(c7, {1, 6, 10, 12, 14}))
    return Isa::avx2;
  return Isa::avx512;
}
#else
Isa detect() {
  return Isa::scalar;
}
#endif

Isa highest() {
  static const Isa level = detect();
  return level;
}

Isa parse(const std::string& name, const char* origin) {
  for (Isa level : kLevels)
    if (level <= highest() && name == isa_name(level))
      return level;
  std::string message = std::string(origin) + ": no ISA level '" + name + "' here; available:";
  for (const std::string& available : isa_levels())
    message += " " + available;
  throw std::invalid_argument(message);
}

std::atomic<int> active{-1};

} // namespace

Isa isa() {
  int level = active.load(std::memory_order_relaxed);
  if (level < 0) {
    const char* name = std::getenv("FEDMAP_SPARSE_ISA");
    level = static_cast<int>(name && *name ? parse(name, "FEDMAP_SPARSE_ISA") : highest());
    active.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

const char* isa_name(Isa level) {
  return level == Isa::avx512 ? "avx512" : level == Isa::avx2 ? "avx2" : "scalar";
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (Isa level : kLevels)
    if (level <= highest())
      names.emplace_back(isa_name(level));
  return names;
}

void set_isa(const std::string& name) {
  active.store(static_cast<int>(parse(name, "set_isa")), std::memory_order_relaxed);
}

namespace scalar {
static const char* probe() {
  return "scalar";
}
} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {
static const char* probe() {
  return "avx2";
}
} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {
static const char* probe() {
  return "avx512";
}
} // namespace avx512
FEDMAP_TARGET_END
#endif

const char* isa_probe() {
  return FEDMAP_DISPATCH(probe)();
}

} // namespace fedmap
