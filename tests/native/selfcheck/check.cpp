#include "check.h"

#include <algorithm>
#include <cstdio>

#include "core/bits.h"
#include "core/cpu.h"
#include "core/dtype.h"
#include "core/half.h"
#include "mask/mask.h"

namespace selfcheck {
namespace {

int failures = 0, comparisons = 0;

const float kSpecials[] = {0.0f,
                           -0.0f,
                           1e-45f,
                           -1e-45f,
                           1.17549421e-38f,
                           1.17549435e-38f,
                           5.9604645e-8f,
                           2.9802322e-8f,
                           2.98023259e-8f,
                           6.1035156e-5f,
                           6.0975552e-5f,
                           65504.0f,
                           65519.996f,
                           65520.0f,
                           -65520.0f,
                           3.3961775e38f,
                           3.38953139e38f,
                           3.40282347e38f,
                           -3.40282347e38f,
                           1.0f,
                           -1.0f,
                           1.00048828f,
                           1.00146484f,
                           1.00390625f,
                           1.01171875f,
                           0.5f,
                           126.5f,
                           127.5f,
                           -127.5f,
                           1e30f};

} // namespace

bool is_short = false;

void Outcome::add_results(const Buffer<uint8_t>& values, int dtype) {
  if (dtype != fedmap::kFloat32)
    return add(values);
  Buffer<float> floats(values.size() / 4);
  std::memcpy(floats.data(), values.data(), static_cast<size_t>(values.size()));
  add_results(floats);
  intact = intact && values.intact();
}

int report() {
  std::printf("%d comparisons, %d failures\n", comparisons, failures);
  return failures ? 1 : 0;
}

void fail(const std::string& message) {
  ++failures;
  std::printf("FAILED %s\n", message.c_str());
}

void expect(bool holds, const std::string& message) {
  ++comparisons;
  if (!holds)
    fail(message);
}

void compare(const std::string& name, const Run& run, const std::vector<int>& threads) {
  fedmap::set_isa("scalar");
  Outcome wanted;
  run(1, wanted);
  ++comparisons;
  if (!wanted.intact)
    fail(name + " scalar, 1 thread: wrote outside of its output");
  for (const std::string& level : fedmap::isa_levels()) {
    fedmap::set_isa(level);
    for (int count : threads.empty() ? std::vector<int>{1} : threads) {
      if (is_short && !threads.empty() && count != threads.back())
        continue;
      if (level == "scalar" && count == 1)
        continue;
      Outcome got;
      run(count, got);
      ++comparisons;
      const std::string where = name + " " + level + ", " + std::to_string(count) + " threads: ";
      if (!got.intact)
        fail(where + "wrote outside of its output");
      if (got.bytes == wanted.bytes)
        continue;
      if (got.bytes.size() != wanted.bytes.size()) {
        fail(where + "outputs of another size than the scalar level's");
        continue;
      }
      const auto at = std::mismatch(got.bytes.begin(), got.bytes.end(), wanted.bytes.begin()).first;
      fail(where + "differs from the scalar level at byte " +
           std::to_string(at - got.bytes.begin()) + " of " + std::to_string(got.bytes.size()));
    }
  }
}

const std::vector<int64_t>& edges() {
  static const std::vector<int64_t> sizes = [] {
    std::vector<int64_t> made;
    for (int64_t n = 0; n <= 36; ++n)
      made.push_back(n);
    for (int64_t edge : {48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 16384, 32768})
      for (int64_t n = edge - 1; n <= edge + 1 && (n < 3000 || !is_short); ++n)
        made.push_back(n);
    return made;
  }();
  return sizes;
}

const std::vector<int>& thread_counts() {
  static const std::vector<int> counts = {1, 2, 3, 7};
  return counts;
}

const char* name_of(Kind kind) {
  return kind == Kind::normal ? "normal" : kind == Kind::ties ? "ties" : "special";
}

const char* name_of_dtype(int dtype) {
  return dtype == fedmap::kFloat32 ? "float32" : dtype == fedmap::kFloat16 ? "float16" : "bfloat16";
}

float float_at(uint64_t seed, uint64_t i, Kind kind) {
  const uint64_t r = random_at(seed, i);
  // In [-1, 1), times 2^0 to 2^-15: exact in float32.
  const float unit = static_cast<float>(static_cast<int64_t>(r >> 40) - (1 << 23)) * 0x1p-23f;
  const float normal = unit / static_cast<float>(1u << (r & 15));
  switch (kind) {
  case Kind::ties:
    return static_cast<float>(static_cast<int>(r % 7) - 3) * 0.25f;
  case Kind::special: {
    const uint64_t pick = r >> 8 & 63;
    if (pick < sizeof kSpecials / sizeof kSpecials[0])
      return kSpecials[pick];
    if (pick == 62)
      return fedmap::bits_float(r & 1 ? 0x7f800000 : 0xff800000);
    return pick == 63 ? fedmap::bits_float(0x7fc00000) : normal;
  }
  default:
    return normal;
  }
}

void fill(void* out, int dtype, int64_t n, uint64_t seed, Kind kind) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = float_at(seed, static_cast<uint64_t>(i), kind);
    if (dtype == fedmap::kFloat32)
      static_cast<float*>(out)[i] = x;
    else if (dtype == fedmap::kFloat16)
      static_cast<fedmap::Float16*>(out)[i] = fedmap::narrow<fedmap::Float16>(x);
    else
      static_cast<fedmap::Bfloat16*>(out)[i] = fedmap::narrow<fedmap::Bfloat16>(x);
  }
}

Bitmap random_bitmap(int64_t numel, double density, uint64_t seed) {
  Bitmap made{Buffer<uint32_t>(fedmap::mask_words(numel)),
              Buffer<int64_t>(fedmap::mask_blocks(numel) + 1), numel, 0};
  const auto limit = static_cast<uint64_t>(density * 4294967296.0);
  for (int64_t w = 0; w < made.words.size(); ++w) {
    uint32_t word = 0;
    for (int64_t i = 32 * w; i < std::min(numel, 32 * w + 32); ++i)
      word |= static_cast<uint32_t>(random_at(seed, static_cast<uint64_t>(i)) >> 32 < limit)
              << (i & 31);
    made.words[w] = word;
  }
  const std::string level = fedmap::isa_name(fedmap::isa());
  fedmap::set_isa("scalar");
  made.nnz = fedmap::rank_index(made.words.data(), numel, made.rank.data(), 1);
  fedmap::set_isa(level);
  return made;
}

} // namespace selfcheck
