// CRC-32C, and the entropy coder: the bytes that are written, what they decode to, and what is
// said of bytes that are broken.
#include <algorithm>

#include "check.h"
#include "codec/crc32c.h"
#include "core/bits.h"
#include "core/dtype.h"
#include "entropy/entropy.h"

namespace selfcheck {
namespace {

void add_fault(const fedmap::Fault& fault, Outcome& out) {
  for (const char* c = fault.reason ? fault.reason : "sound"; *c; ++c)
    out.add_value(*c);
  out.add_value(fault.offset);
}

// Each payload is decoded as it is, cut short, and with bits flipped all over it.
template <class Decode>
void each_damage(const Buffer<uint8_t>& payload, int64_t size, Decode&& decode) {
  Buffer<uint8_t> copy(size, 2);
  std::memcpy(copy.data(), payload.data(), static_cast<size_t>(size));
  decode(copy.data(), size);
  for (int64_t less : {1, 2, 4, 64})
    if (size >= less)
      decode(copy.data(), size - less);
  for (uint64_t k = 0; k < 12 && size; ++k) {
    const auto bit = static_cast<int64_t>(random_at(101, k) % static_cast<uint64_t>(8 * size));
    copy[bit / 8] = static_cast<uint8_t>(copy[bit / 8] ^ 1 << bit % 8);
    decode(copy.data(), size);
    copy[bit / 8] = static_cast<uint8_t>(copy[bit / 8] ^ 1 << bit % 8);
  }
}

void check_mask(int64_t first, int64_t second, int code, double density, int64_t chunk_steps,
                const std::vector<int>& threads) {
  constexpr int64_t kGap = 37;
  const int64_t numel = first + kGap + second;
  Bitmap mask = random_bitmap(numel, density, static_cast<uint64_t>(numel) + 111);
  for (int64_t i = first; i < first + kGap; ++i) // between the two runs
    mask.words[i / 32] &= ~(1u << i % 32);
  const int64_t start[] = {0, first + kGap}, sizes[] = {first, second};
  const fedmap::MaskRuns runs{start, sizes, 2};
  // A tensor without bits has the code of zeros.
  const uint8_t codes[] = {static_cast<uint8_t>(first ? code : 127),
                           static_cast<uint8_t>(second ? code : 127)};
  const int64_t capacity = numel + 4096;
  const std::string name = label("entropy mask", numel) + " code " + std::to_string(code);
  compare(
      name,
      [&](int t, Outcome& out) {
        Buffer<uint8_t> payload(capacity);
        const int64_t size = fedmap::encode_mask(mask.words.data(), runs, codes, chunk_steps,
                                                 payload.data(), capacity, t);
        out.add_value(size);
        if (size < 0)
          return;
        out.add(payload, size);
        bool first_time = true;
        each_damage(payload, size, [&](const uint8_t* bytes, int64_t n) {
          Buffer<uint32_t> words(fedmap::mask_words(numel));
          const fedmap::Fault fault = fedmap::decode_mask(bytes, n, runs, numel, words.data(), t);
          add_fault(fault, out);
          if (!fault.reason)
            out.add(words);
          if (first_time &&
              (fault.reason || std::memcmp(words.data(), mask.words.data(),
                                           static_cast<size_t>(4 * words.size())) != 0))
            fail(name + ": does not come back");
          first_time = false;
        });
      },
      threads);
}

void check_values(int64_t n, int dtype, Kind kind, const std::vector<int>& threads) {
  const int64_t width = fedmap::dtype_bytes(dtype);
  Buffer<uint8_t> values(n * width);
  fill(values.data(), dtype, n, 121, kind);
  const int64_t capacity = 2 * n * width + 8192;
  const std::string name =
      label("entropy values", n) + " " + name_of_dtype(dtype) + " " + name_of(kind);
  compare(
      name,
      [&](int t, Outcome& out) {
        Buffer<uint8_t> payload(capacity);
        const int64_t size =
            fedmap::encode_values(values.data(), dtype, n, payload.data(), capacity, t);
        out.add_value(size);
        out.add(payload, std::max<int64_t>(size, 0));
        bool first_time = true;
        each_damage(payload, size, [&](const uint8_t* bytes, int64_t m) {
          Buffer<uint8_t> back(n * width);
          const fedmap::Fault fault = fedmap::decode_values(bytes, m, dtype, n, back.data(), t);
          add_fault(fault, out);
          if (first_time && (fault.reason || std::memcmp(back.data(), values.data(),
                                                         static_cast<size_t>(n * width)) != 0))
            fail(name + ": does not come back");
          if (!fault.reason)
            out.add(back);
          bool finite = false;
          add_fault(fedmap::check_values(bytes, m, dtype, n, &finite, t), out);
          out.add_value(!fault.reason && finite);
          if (first_time) {
            Buffer<double> sums(n);
            std::fill_n(sums.data(), n, 0.5);
            add_fault(fedmap::add_values(bytes, m, dtype, n, sums.data(), 0.75, t), out);
            out.add(sums);
          }
          first_time = false;
        });
      },
      threads);
}

} // namespace

void check_crc() {
  constexpr int64_t kBytes = (3 << 20) + 13;
  Buffer<uint8_t> data(kBytes);
  for (int64_t i = 0; i < kBytes; ++i)
    data[i] = static_cast<uint8_t>(random_at(131, static_cast<uint64_t>(i)));
  std::vector<int64_t> sizes = edges();
  sizes.insert(sizes.end(), {767, 768, 769, 775, 12'287, 12'288, 12'289, 13'000});
  for (int64_t n : sizes)
    for (int64_t at : {0, 1, 7})
      compare(label("crc32c", n), [&](int t, Outcome& out) {
        out.add_value(fedmap::crc32c(data.data() + at, n, 77, t));
      });
  compare(
      "crc32c of 3 MiB",
      [&](int t, Outcome& out) { out.add_value(fedmap::crc32c(data.data(), kBytes, 0, t)); },
      thread_counts());
  if (fedmap::crc32c("123456789", 9, 0, 1) != 0xE3069283u) // the catalogues' check value
    fail("crc32c of 123456789");
}

void check_entropy() {
  // Codes: 0 an even density, 24 one in eight, 128 + 16 ones in three of four, 80 very few.
  for (int64_t n : {1, 3, 4, 127, 128, 129, 1000, 8191, 8192, 8193})
    for (int code : {0, 24, 80, 144}) {
      const double density = code == 24 ? 0.12 : code == 80 ? 0.002 : code == 144 ? 0.75 : 0.5;
      check_mask(n, n / 3, code, density, 1024, {});
    }
  check_mask(100'000, 0, 24, 0.12, 1024, {});
  check_mask(2 * kLarge, 9'999, 24, 0.12, 1024, thread_counts());
  for (int dtype : {fedmap::kFloat32, fedmap::kFloat16, fedmap::kBfloat16})
    for (Kind kind : kKinds) {
      for (int64_t n : {1, 7, 31, 32, 33, 63, 64, 65, 1023, 1025, 32767, 32768, 32769})
        check_values(n, dtype, kind, {});
      check_values(kLarge / 4, dtype, kind, {1, 3});
    }
}

} // namespace selfcheck
