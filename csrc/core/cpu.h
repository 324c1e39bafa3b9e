// ISA levels: which exist, which one runs, and how a function is compiled for one of them.
//
// A kernel's file holds the same static functions in the namespace `scalar` and in one namespace
// for each vector level of the processor: `avx2` and `avx512_core` inside `#if FEDMAP_X86`, between
// FEDMAP_TARGET_* and FEDMAP_TARGET_END; `neon` inside `#if FEDMAP_ARM64`, whose vectors every
// 64-bit ARM has. FEDMAP_DISPATCH(name) is the address of the one to run. No file needs an -march
// flag.
//
// `avx512_core` is what every processor with AVX-512 but the Xeon Phi has: Skylake's and Cascade
// Lake's set (the name is oneDNN's). `avx512` adds what came with Ice Lake and Zen 4, first of all
// compress and expand of 16-bit elements; a file has a region for it only where that is of use, and
// outside of an unnamed namespace: a name that it does not define is avx512_core's.
#pragma once

#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__ARM_NEON)
#define FEDMAP_ARM64 1
#include <arm_neon.h>
#else
#define FEDMAP_ARM64 0
#endif

#if defined(__x86_64__)
#define FEDMAP_X86 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics' deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#else
#define FEDMAP_X86 0
#endif

#if FEDMAP_X86 || FEDMAP_ARM64
#define FEDMAP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FEDMAP_TARGET_BEGIN(features)                                                              \
  FEDMAP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FEDMAP_TARGET_END _Pragma("clang attribute pop")
#else
#define FEDMAP_TARGET_BEGIN(features)                                                              \
  _Pragma("GCC push_options") FEDMAP_PRAGMA(GCC target(features))
#define FEDMAP_TARGET_END _Pragma("GCC pop_options")
#endif
#endif

#if FEDMAP_X86
#define FEDMAP_AVX2_FEATURES "avx2,bmi,bmi2,lzcnt,popcnt,f16c,pclmul,sse4.2"
#define FEDMAP_AVX512_CORE_FEATURES                                                                \
  FEDMAP_AVX2_FEATURES ",avx512f,avx512bw,avx512dq,avx512vl,avx512cd"
#define FEDMAP_AVX512_FEATURES                                                                     \
  FEDMAP_AVX512_CORE_FEATURES ",avx512vbmi,avx512vbmi2,avx512bitalg,avx512vpopcntdq,vpclmulqdq"
#define FEDMAP_TARGET_AVX2 FEDMAP_TARGET_BEGIN(FEDMAP_AVX2_FEATURES)
#define FEDMAP_TARGET_AVX512_CORE FEDMAP_TARGET_BEGIN(FEDMAP_AVX512_CORE_FEATURES)
#define FEDMAP_TARGET_AVX512 FEDMAP_TARGET_BEGIN(FEDMAP_AVX512_FEATURES)
#define FEDMAP_DISPATCH(...)                                                                       \
  ::fedmap::choose(&scalar::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512_core::__VA_ARGS__,            \
                   &avx512::__VA_ARGS__)
#elif FEDMAP_ARM64
#define FEDMAP_DISPATCH(...) ::fedmap::choose(&scalar::__VA_ARGS__, &neon::__VA_ARGS__)
#else
#define FEDMAP_DISPATCH(...) (&scalar::__VA_ARGS__)
#endif

namespace fedmap {

#if FEDMAP_X86
namespace avx512_core {}
namespace avx512 {
using namespace avx512_core;
}
#endif

// The level that runs, from 0, `scalar`, upwards: FEDMAP_SPARSE_ISA, else the highest of this
// machine. Throws std::invalid_argument, naming the levels there are, when the variable names none
// of them.
int isa();
const char* isa_name(int level);
std::vector<std::string> isa_levels();
void set_isa(const std::string& name);
// The level whose code a dispatched call ends in.
const char* isa_probe();

#if FEDMAP_ARM64
// CRC instructions: optional in ARMv8.0 (a Cortex-A53 may have them), part of ARMv8.1.
bool has_arm_crc32();
#endif

// One form for each level that this processor family has, from the lowest up.
template <class F>
F* choose(F* scalar, F* second) {
  return isa() == 0 ? scalar : second;
}
template <class F>
F* choose(F* scalar, F* second, F* third, F* fourth) {
  F* const forms[] = {scalar, second, third, fourth};
  return forms[isa()];
}

} // namespace fedmap
