// ISA levels: which exist, which one runs, and how a function is compiled for one of them.
//
// A kernel's file holds the same static functions in the namespaces `scalar`, `avx2` and `avx512`,
// the last two between FEDMAP_TARGET_* and FEDMAP_TARGET_END inside `#if FEDMAP_X86`;
// FEDMAP_DISPATCH(name) is the address of the one to run. No file needs an -march flag.
#pragma once

#include <string>
#include <vector>

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

#if FEDMAP_X86
#define FEDMAP_AVX2_FEATURES "avx2,bmi,bmi2,lzcnt,popcnt,f16c,pclmul,sse4.2"
#define FEDMAP_AVX512_FEATURES                                                                     \
  FEDMAP_AVX2_FEATURES                                                                             \
  ",avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512vbmi,avx512vbmi2,avx512bitalg,"              \
  "avx512vpopcntdq,vpclmulqdq"
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
#define FEDMAP_TARGET_AVX2 FEDMAP_TARGET_BEGIN(FEDMAP_AVX2_FEATURES)
#define FEDMAP_TARGET_AVX512 FEDMAP_TARGET_BEGIN(FEDMAP_AVX512_FEATURES)
#define FEDMAP_DISPATCH(...)                                                                       \
  ::fedmap::choose(&scalar::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__)
#else
#define FEDMAP_DISPATCH(...) (&scalar::__VA_ARGS__)
#endif

namespace fedmap {

enum class Isa : int { scalar, avx2, avx512 };

// The level that runs: FEDMAP_SPARSE_ISA, else the highest of this machine. Throws
// std::invalid_argument, naming the levels there are, when the variable names none of them.
Isa isa();
const char* isa_name(Isa level);
std::vector<std::string> isa_levels();
void set_isa(const std::string& name);
// The level whose code a dispatched call ends in.
const char* isa_probe();

template <class F>
F* choose(F* scalar, F* avx2, F* avx512) {
  switch (isa()) {
  case Isa::avx512:
    return avx512;
  case Isa::avx2:
    return avx2;
  default:
    return scalar;
  }
}

} // namespace fedmap
