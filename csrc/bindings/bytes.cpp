// What reads or writes plain memory: the checksum, and the floors of the benchmarks.
#include "bindings/args.h"
#include "codec/crc32c.h"
#include "floors/stream.h"

namespace fedmap {
namespace {

const Binding binding([](py::module_& m) {
  m.def(
      "crc32c",
      [](const Bytes& data, uint32_t crc, int threads) {
        return crc32c(data.data, data.size, crc, threads);
      },
      Unlocked());
  m.def(
      "stream_read",
      [](const Bytes& src, int threads) { return stream_read(src.data, src.size, threads); },
      Unlocked());
  m.def(
      "stream_copy",
      [](const Flat& src, const Flat& dst, int threads) {
        require(src.is_some() && dst.is_some() && src.nbytes() == dst.nbytes());
        stream_copy(src.data, dst.data, src.nbytes(), threads);
      },
      Unlocked());
  m.def(
      "stream_inplace",
      [](const Flat& buffer, int threads) {
        require(buffer.is_some());
        stream_inplace(buffer.data, buffer.nbytes(), threads);
      },
      Unlocked());
  m.def(
      "stream_touched",
      [](const Flat& buffer, const Flat& words, int64_t numel, int threads) {
        require(buffer.is_some() && numel >= 0 && buffer.nbytes() >= 4 * numel &&
                words.is(kInt32, mask_words(numel)));
        stream_touched(buffer.as<float>(), words.as<uint32_t>(), numel, threads);
      },
      Unlocked());
});

} // namespace
} // namespace fedmap
