#include "core/cpu.h"

#include "core/ahead.h"

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#if FEDMAP_X86
#include <cpuid.h>
#elif FEDMAP_ARM64 && defined(__linux__)
#include <sys/auxv.h>
#elif FEDMAP_ARM64 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fedmap {
namespace {

// The levels of this processor family, in the order of FEDMAP_DISPATCH, and those of the others,
// for the message of an error.
#if FEDMAP_X86
enum : int { kScalar, kAvx2, kAvx512Core, kAvx512 };
constexpr const char* kLevels[] = {"scalar", "avx2", "avx512_core", "avx512"};
constexpr const char* kOthers[][2] = {{"neon", "64-bit ARM"}};
constexpr const char* kFamily = "x86-64";
#elif FEDMAP_ARM64
enum : int { kScalar, kNeon };
constexpr const char* kLevels[] = {"scalar", "neon"};
constexpr const char* kOthers[][2] = {
    {"avx2", "x86-64"}, {"avx512_core", "x86-64"}, {"avx512", "x86-64"}};
constexpr const char* kFamily = "64-bit ARM";
#else
enum : int { kScalar };
constexpr const char* kLevels[] = {"scalar"};
constexpr const char* kOthers[][2] = {
    {"avx2", "x86-64"}, {"avx512_core", "x86-64"}, {"avx512", "x86-64"}, {"neon", "64-bit ARM"}};
constexpr const char* kFamily = "a processor without vector levels";
#endif

#if FEDMAP_X86
// cpuid by hand: __builtin_cpu_supports of clang 14 does not know all of the names needed.
int detect() {
  auto has = [](unsigned word, std::initializer_list<int> bits) {
    for (int bit : bits)
      if (!(word >> bit & 1))
        return false;
    return true;
  };
  unsigned a, b1, c1, d1, b7, c7, d7, bx, cx, dx;
  if (!__get_cpuid(1, &a, &b1, &c1, &d1) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) ||
      !__get_cpuid(0x80000001, &a, &bx, &cx, &dx))
    return kScalar;
  // pclmul, sse4.2, popcnt, osxsave, avx, f16c
  if (!has(c1, {1, 20, 23, 27, 28, 29}))
    return kScalar;
  unsigned enabled, high;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  // The system saves xmm and ymm; bmi1, avx2, bmi2; lzcnt.
  if ((enabled & 0x6) != 0x6 || !has(b7, {3, 5, 8}) || !has(cx, {5}))
    return kScalar;
  // The system saves opmask and zmm; avx512 f, dq, cd, bw, vl.
  if ((enabled & 0xe0) != 0xe0 || !has(b7, {16, 17, 28, 30, 31}))
    return kAvx2;
  // vbmi, vbmi2, vpclmulqdq, bitalg, vpopcntdq.
  return has(c7, {1, 6, 10, 12, 14}) ? kAvx512 : kAvx512Core;
}
#elif FEDMAP_ARM64
int detect() {
  return kNeon;
}
#else
int detect() {
  return kScalar;
}
#endif

int highest() {
  static const int level = detect();
  return level;
}

int parse(const std::string& name, const char* origin) {
  for (int level = 0; level <= highest(); ++level)
    if (name == kLevels[level])
      return level;
  std::string message = std::string(origin) + ": no ISA level '" + name + "' here; available:";
  for (const std::string& available : isa_levels())
    message += " " + available;
  for (const auto& [other, family] : kOthers)
    if (name == other)
      message +=
          std::string(" (") + other + " is a level of " + family + ", and this is " + kFamily + ")";
  throw std::invalid_argument(message);
}

std::atomic<int> active{-1};

bool is_intel() {
#if FEDMAP_X86
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && d == signature_INTEL_edx &&
         c == signature_INTEL_ecx;
#else
  return false;
#endif
}

int64_t vendors_read_ahead() {
  return is_intel() ? 8 << 10 : 0;
}

int64_t models_write_ahead() {
#if FEDMAP_X86
  unsigned version, b, c, d;
  if (is_intel() && __get_cpuid(1, &version, &b, &c, &d)) {
    const unsigned family = version >> 8 & 15, model = (version >> 12 & 0xf0) | (version >> 4 & 15);
    if (family == 6 && model == 85)
      return 4 << 10;
  }
#endif
  return 0;
}

} // namespace

int isa() {
  int level = active.load(std::memory_order_relaxed);
  if (level < 0) {
    const char* name = std::getenv("FEDMAP_SPARSE_ISA");
    level = name && *name ? parse(name, "FEDMAP_SPARSE_ISA") : highest();
    active.store(level, std::memory_order_relaxed);
  }
  return level;
}

const char* isa_name(int level) {
  return kLevels[level];
}

std::vector<std::string> isa_levels() {
  return {kLevels, kLevels + highest() + 1};
}

std::atomic<int64_t> read_ahead_bytes{vendors_read_ahead()};
std::atomic<int64_t> write_ahead_bytes{models_write_ahead()};

void set_isa(const std::string& name) {
  active.store(parse(name, "set_isa"), std::memory_order_relaxed);
}

#if FEDMAP_ARM64
bool has_arm_crc32() {
#if defined(__linux__)
  static const bool has = getauxval(AT_HWCAP) & 1 << 7; // HWCAP_CRC32
#elif defined(__APPLE__)
  static const bool has = [] {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.armv8_crc32", &value, &size, nullptr, 0) == 0 && value;
  }();
#else
  static const bool has = false;
#endif
  return has;
}
#endif

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

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {
static const char* probe() {
  return "avx512_core";
}
} // namespace avx512_core
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {
static const char* probe() {
  return "avx512";
}
} // namespace avx512
FEDMAP_TARGET_END
#elif FEDMAP_ARM64
namespace neon {
static const char* probe() {
  return "neon";
}
} // namespace neon
#endif

const char* isa_probe() {
  return FEDMAP_DISPATCH(probe)();
}

} // namespace fedmap
