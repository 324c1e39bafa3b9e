// Survivors side by side, and back. Each block's place in the packed buffer is in the rank index.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/ahead.h"
#include "core/bits.h"
#include "core/cpu.h"
#include "core/dtype.h"
#include "core/pool.h"
#include "core/streaming.h"
#include "pack/pack.h"
#include "pack/pack_block.h"
#include "quantize/quantize.h"

namespace fedmap {

constexpr int64_t kPackBlocks = 128; // one task: 1 MiB of float32
// Survivors that are converted at once: as many as fit L1, since each call has its cost.
constexpr int64_t kBatch = 2 * kBlock;
// Elements that are packed at once.
constexpr int64_t kRoom = std::max(kChunk, kSpan / kSparse) + kPackSlack;

namespace scalar {

// Whole lines to where a line begins. `kStream`: past the cache.
template <bool kStream>
static void copy_lines(const char* from, char* to, int64_t bytes) {
  std::memcpy(to, from, bytes);
}

// Writes every element of the block, unlike unpack_block. `kStream`: past the cache; `dst` is
// aligned to 64 bytes then.
template <class T, bool kStream>
static void expand_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  for (int64_t i = 0; i < n; i += 32)
    packed =
        unpack_word(packed, words[i / 32] & low_bits(n - i), dst + i, std::min<int64_t>(32, n - i));
}

} // namespace scalar

#if FEDMAP_X86
FEDMAP_TARGET_AVX2
namespace avx2 {

template <bool kStream>
static void copy_lines(const char* from, char* to, int64_t bytes) {
  const int64_t ahead = write_ahead();
  for (int64_t i = 0; i < bytes; i += 32) {
    ask(to + i, ahead);
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i));
    if constexpr (kStream)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), v);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), v);
  }
}

template <class T, bool kStream>
static void expand_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  const int64_t whole = n / 32 * 32, ahead = write_ahead();
  for (int64_t i = 0; i < whole; i += 32) {
    const uint32_t word = words[i / 32];
    if constexpr (kStream) {
      alignas(32) T line[32];
      for (int byte = 0; byte < 32; byte += 8) {
        unpack_8(packed, word >> byte & 0xff, line + byte);
        packed += _mm_popcnt_u32(word >> byte & 0xff);
      }
      for (size_t k = 0; k < sizeof line / 32; ++k)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i) + k,
                            _mm256_load_si256(reinterpret_cast<const __m256i*>(line) + k));
    } else {
      for (int64_t k = 0; k < 32; k += 64 / sizeof(T))
        ask(dst + i + k, ahead);
      for (int byte = 0; byte < 32; byte += 8) {
        unpack_8(packed, word >> byte & 0xff, dst + i + byte);
        packed += _mm_popcnt_u32(word >> byte & 0xff);
      }
    }
  }
  scalar::expand_block<T, false>(packed, words + whole / 32, n - whole, dst + whole);
}

} // namespace avx2
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512_CORE
namespace avx512_core {

template <bool kStream>
static void copy_lines(const char* from, char* to, int64_t bytes) {
  const int64_t ahead = write_ahead();
  for (int64_t i = 0; i < bytes; i += 64) {
    ask(to + i, ahead);
    const __m512i v = _mm512_load_si512(from + i);
    if constexpr (kStream)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), v);
    else
      _mm512_storeu_si512(to + i, v);
  }
}

#include "pack/expand_block_avx512.h"

} // namespace avx512_core
FEDMAP_TARGET_END

FEDMAP_TARGET_AVX512
namespace avx512 {
#include "pack/expand_block_avx512.h"
} // namespace avx512
FEDMAP_TARGET_END

#elif FEDMAP_ARM64
// No store of baseline ARM goes past the cache for sure: kStream changes nothing.
namespace neon {

template <bool>
static void copy_lines(const char* from, char* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    std::memcpy(to + i, from + i, 64);
}

template <class T, bool>
static void expand_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  unpack_block(packed, words, n, dst);
}

} // namespace neon
#endif

namespace {

int threads_of(int64_t numel, int width, int threads) {
  return threads_for(numel * width, threads);
}

// Survivors on their way from a buffer in L1 to where they belong, by whole lines. Packed in place,
// vectors that overrun each other in lines outside of the cache took 5.2 ms of one thread of Zen 4
// for 26 M float32 at density .1, this 4.0; 6.0 and 4.9 at .5. Through the buffer a block at a time
// instead of a chunk: 4.3 and 5.6.
template <class T>
class LineWriter {
 public:
  LineWriter(T* to, bool stream)
      : skip_(reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T)), held_(skip_), to_(to - skip_),
        copy_(stream ? FEDMAP_DISPATCH(copy_lines<true>) : FEDMAP_DISPATCH(copy_lines<false>)) {}

  // Where to put the next ones, at most kChunk and some slack; `added` says how many they were.
  T* room() { return buffer_ + held_; }

  void added(int64_t count) {
    held_ += count;
    const int64_t whole = held_ / kLine * kLine;
    if (whole == 0)
      return;
    if (skip_ > 0)
      std::memcpy(to_ + skip_, buffer_ + skip_, (kLine - skip_) * sizeof(T));
    const int64_t done = skip_ > 0 ? kLine : 0;
    copy_(reinterpret_cast<const char*>(buffer_ + done), reinterpret_cast<char*>(to_ + done),
          (whole - done) * sizeof(T));
    std::memcpy(buffer_, buffer_ + whole, 64);
    to_ += whole;
    held_ -= whole;
    skip_ = 0;
  }

  void finish() {
    std::memcpy(to_ + skip_, buffer_ + skip_, (held_ - skip_) * sizeof(T));
    end_of_stream();
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  alignas(64) T buffer_[kLine + kRoom];
  int64_t skip_; // what the first line holds of others
  int64_t held_;
  T* to_;
  void (*copy_)(const char*, char*, int64_t);
};

// Likewise, converted.
template <class T>
class Converter {
 public:
  Converter(int dtype, char* to, int out_dtype) : dtype_(dtype), out_dtype_(out_dtype), to_(to) {}

  T* room() { return buffer_ + held_; }

  void added(int64_t count) {
    held_ += count;
    if (held_ > kBatch)
      finish();
  }

  void finish() {
    overflowed += cast(buffer_, dtype_, to_, out_dtype_, held_, 1);
    to_ += held_ * dtype_bytes(out_dtype_);
    held_ = 0;
  }

  int64_t overflowed = 0;

 private:
  alignas(64) T buffer_[kBatch + kRoom];
  int64_t held_ = 0;
  int dtype_, out_dtype_;
  char* to_;
};

template <class T>
int64_t pack_as(const T* values, int dtype, const uint32_t* words, const int64_t* rank,
                int64_t numel, void* out, int out_dtype, int threads) {
  const auto pack_block = FEDMAP_DISPATCH(pack_block<T>);
  const auto find_block = FEDMAP_DISPATCH(find_block);
  const auto next_chunk = FEDMAP_DISPATCH(next_chunk);
  const int64_t limit = FEDMAP_DISPATCH(sparse_limit<T>)();
  const int64_t blocks = mask_blocks(numel), width = dtype_bytes(out_dtype);
  const bool stream = goes_past_cache(out, rank[blocks] * width, sizeof(T));
  std::atomic<int64_t> overflowed{0};
  parallel_ranges(blocks, kPackBlocks, threads_of(numel, sizeof(T), threads),
                  [&](int64_t begin, int64_t end) {
                    const auto pack_to = [&](auto&& writer) {
                      for (int64_t b = begin, next; b < end; b = next) {
                        next = std::min(end, b + kSpan / kBlock);
                        const int64_t count = rank[next] - rank[b];
                        const int64_t n = std::min(next * kBlock, numel) - b * kBlock;
                        const T* from = values + b * kBlock;
                        const uint32_t* bits = words + b * kBlockWords;
                        if (count * limit < n) {
                          uint16_t places[kRoom];
                          find_block(bits, n, places);
                          prefetch(from, places, count);
                          gather(from, places, count, writer.room());
                          writer.added(count);
                        } else {
                          for (int64_t i = 0, size; i < n; i += size) {
                            size = next_chunk(bits + i / 32, n - i);
                            writer.added(pack_block(from + i, bits + i / 32, size, writer.room()));
                          }
                        }
                      }
                      writer.finish();
                    };
                    char* to = static_cast<char*>(out) + rank[begin] * width;
                    if (dtype == out_dtype) {
                      pack_to(LineWriter<T>(reinterpret_cast<T*>(to), stream));
                    } else {
                      Converter<T> converter(dtype, to, out_dtype);
                      pack_to(converter);
                      overflowed.fetch_add(converter.overflowed, std::memory_order_relaxed);
                    }
                  });
  return overflowed.load();
}

template <class T>
void unpack_as(const void* packed, int packed_dtype, const uint32_t* words, const int64_t* rank,
               int64_t numel, T* out, int out_dtype, int threads) {
  constexpr int64_t kSlack = kPackSlack / sizeof(T);
  const bool stream = goes_past_cache(out, numel * static_cast<int64_t>(sizeof(T)));
  const auto expand_block =
      stream ? FEDMAP_DISPATCH(expand_block<T, true>) : FEDMAP_DISPATCH(expand_block<T, false>);
  const int64_t blocks = mask_blocks(numel), nnz = rank[blocks], width = dtype_bytes(packed_dtype);
  parallel_ranges(
      blocks, kPackBlocks, threads_of(numel, sizeof(T), threads), [&](int64_t begin, int64_t end) {
        alignas(64) T buffer[kBatch + kSlack];
        int64_t converted = begin; // blocks from `first` to here are in the buffer
        for (int64_t b = begin, first = begin; b < end; ++b) {
          const char* from = static_cast<const char*>(packed) + rank[b] * width;
          if (packed_dtype != out_dtype) {
            if (b == converted) {
              first = b;
              while (converted < end && rank[converted + 1] - rank[first] <= kBatch)
                ++converted;
              cast(from, packed_dtype, buffer, out_dtype, rank[converted] - rank[first], 1);
            }
            from = reinterpret_cast<const char*>(buffer + (rank[b] - rank[first]));
          } else if (rank[b + 1] + kSlack > nnz) {
            // Whole vectors would be read past the end of the packed values.
            std::memcpy(buffer, from, (rank[b + 1] - rank[b]) * sizeof(T));
            from = reinterpret_cast<const char*>(buffer);
          }
          expand_block(reinterpret_cast<const T*>(from), words + b * kBlockWords,
                       std::min(kBlock, numel - b * kBlock), out + b * kBlock);
        }
        if (stream)
          end_of_stream();
      });
}

} // namespace

int64_t pack(const void* values, int dtype, const uint32_t* words, const int64_t* rank,
             int64_t numel, void* out, int out_dtype, int threads) {
  if (dtype == kFloat32)
    return pack_as(static_cast<const uint32_t*>(values), dtype, words, rank, numel, out, out_dtype,
                   threads);
  return pack_as(static_cast<const uint16_t*>(values), dtype, words, rank, numel, out, out_dtype,
                 threads);
}

void unpack(const void* packed, int packed_dtype, const uint32_t* words, const int64_t* rank,
            int64_t numel, void* out, int out_dtype, int threads) {
  if (out_dtype == kFloat32)
    unpack_as(packed, packed_dtype, words, rank, numel, static_cast<uint32_t*>(out), out_dtype,
              threads);
  else
    unpack_as(packed, packed_dtype, words, rank, numel, static_cast<uint16_t*>(out), out_dtype,
              threads);
}

} // namespace fedmap
