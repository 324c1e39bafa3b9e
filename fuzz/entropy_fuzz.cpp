// libFuzzer target of the decoders that read payloads from the wire: `make fuzz`.
//
// Byte 0 chooses what is read, bytes 1-2 its size or shape; the rest is the payload, copied to memory of
// exactly its size so that AddressSanitizer sees a read past the end. What decodes is encoded again
// and must come back.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/bits.h"
#include "core/dtype.h"
#include "entropy/entropy.h"

using namespace fedmap;

namespace {

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
  }
}

struct Shape {
  std::vector<int64_t> start, numel;
  int64_t bits;
};

const Shape kShapes[] = {
    {{0}, {1000}, 1024},
    {{0, 128, 256, 384}, {5, 0, 127, 300}, 768},
    {{0, 515, 150965, 150968}, {515, 150450, 3, 728}, 151696},
    {{3}, {300001}, 300004},
    {{3, 2000}, {1, 500001}, 502004}, // more chunks than streams at once
};

void read_mask(const Shape& shape, const uint8_t* payload, int64_t size, int threads) {
  const MaskRuns runs{shape.start.data(), shape.numel.data(),
                      static_cast<int64_t>(shape.start.size())};
  std::vector<uint32_t> words(mask_words(shape.bits)), again(words.size());
  if (decode_mask(payload, size, runs, shape.bits, words.data(), threads).reason)
    return;
  uint32_t chunk_steps;
  std::memcpy(&chunk_steps, payload, 4);
  std::unique_ptr<uint8_t[]> copy(new uint8_t[size]);
  const int64_t written =
      encode_mask(words.data(), runs, payload + 8, chunk_steps, copy.get(), size, threads);
  require(written == size && !std::memcmp(copy.get(), payload, size),
          "a mask that decodes is written in other bytes");
  require(!decode_mask(copy.get(), written, runs, shape.bits, again.data(), threads).reason,
          "a written mask does not decode");
  require(words == again, "a mask did not come back");
}

void read_values(int dtype, int64_t n, const uint8_t* payload, int64_t size, int threads) {
  const int64_t bytes = n * dtype_bytes(dtype);
  std::vector<uint8_t> values(bytes), again(bytes);
  bool finite = false, finite_again = false;
  const Fault fault = decode_values(payload, size, dtype, n, values.data(), threads);
  const Fault check = check_values(payload, size, dtype, n, &finite, threads);
  require(fault.reason == check.reason && fault.offset == check.offset, "two verdicts");
  if (fault.reason)
    return;
  std::vector<double> sums(n, 0.0);
  require(!add_values(payload, size, dtype, n, sums.data(), 1.0, threads).reason, "not added");
  std::vector<uint8_t> coded(4 * bytes + 4096);
  const int64_t written = encode_values(values.data(), dtype, n, coded.data(),
                                        static_cast<int64_t>(coded.size()), threads);
  require(written > 0, "values that decode were not written");
  std::unique_ptr<uint8_t[]> exact(new uint8_t[written]);
  std::memcpy(exact.get(), coded.data(), written);
  require(!decode_values(exact.get(), written, dtype, n, again.data(), threads).reason,
          "written values do not decode");
  require(values == again, "values did not come back");
  check_values(exact.get(), written, dtype, n, &finite_again, threads);
  require(finite == finite_again, "finite or not?");
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t length) {
  if (length < 3)
    return 0;
  const int64_t size = static_cast<int64_t>(length) - 3;
  std::unique_ptr<uint8_t[]> payload(new uint8_t[size]);
  std::memcpy(payload.get(), data + 3, size);
  const int threads = 1 + data[0] / 128;
  const int what = data[0] % 4;
  if (what == 3)
    read_mask(kShapes[data[2] == 1 ? 4 : data[1] % 4], payload.get(), size, threads);
  else
    read_values(what, 1 + (data[1] | data[2] << 8), payload.get(), size, threads);
  return 0;
}
