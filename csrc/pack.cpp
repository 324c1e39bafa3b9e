// Survivors side by side, and back. Each block's place in the packed buffer is in the rank index.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "compress.h"
#include "cpu.h"
#include "half.h"
#include "kernels.h"
#include "pool.h"

namespace fedmap {

constexpr int64_t kShareBlocks = 128; // one task: 1 MiB of float32
// Survivors that are converted at once: as many as fit L1, since each call has its cost.
constexpr int64_t kBatch = 2 * kBlock;

namespace scalar {

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

template <class T, bool kStream>
static void expand_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  const int64_t whole = n / 32 * 32;
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

FEDMAP_TARGET_AVX512
namespace avx512 {

template <class T, bool kStream>
static void expand_block(const T* packed, const uint32_t* words, int64_t n, T* dst) {
  constexpr int kLanes = 64 / sizeof(T);
  const __m512i zero = opaque_zero();
  const int64_t whole = n / 32 * 32;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const uint32_t bits = kLanes == 32 ? words[i / 32] : words[i / 32] >> (i & 31) & 0xffff;
    if constexpr (kStream) {
      alignas(64) T line[kLanes];
      packed = unpack_vector(packed, bits, line, zero);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_load_si512(line));
    } else {
      packed = unpack_vector(packed, bits, dst + i, zero);
    }
  }
  scalar::expand_block<T, false>(packed, words + whole / 32, n - whole, dst + whole);
}

} // namespace avx512
FEDMAP_TARGET_END
#endif

namespace {

int threads_of(int64_t numel, int width, int threads) {
  return threads_for(numel * width, threads);
}

// Blocks are packed in place as far as the whole vectors that overrun one stay within the task,
// whose later blocks then write there; the last ones, and all that are converted, by way of a
// buffer.
template <class T>
int64_t pack_as(const T* values, int dtype, const uint32_t* words, const int64_t* rank,
                int64_t numel, void* out, int out_dtype, int threads) {
  constexpr int64_t kSlack = kPackSlack / sizeof(T);
  const auto pack_block = FEDMAP_DISPATCH(pack_block<T>);
  const int64_t blocks = mask_blocks(numel), width = dtype_bytes(out_dtype);
  std::atomic<int64_t> overflowed{0};
  parallel_ranges(
      blocks, kShareBlocks, threads_of(numel, sizeof(T), threads), [&](int64_t begin, int64_t end) {
        alignas(64) T buffer[kBatch + kSlack];
        const auto pack_to = [&](int64_t b, T* to) {
          pack_block(values + b * kBlock, words + b * kBlockWords,
                     std::min(kBlock, numel - b * kBlock), to);
        };
        for (int64_t b = begin, next; b < end; b = next) {
          char* to = static_cast<char*>(out) + rank[b] * width;
          next = b + 1;
          if (dtype != out_dtype) {
            for (next = b; next < end && rank[next + 1] - rank[b] <= kBatch; ++next)
              pack_to(next, buffer + (rank[next] - rank[b]));
            overflowed.fetch_add(cast(buffer, dtype, to, out_dtype, rank[next] - rank[b], 1),
                                 std::memory_order_relaxed);
          } else if (rank[next] + kSlack <= rank[end]) {
            pack_to(b, reinterpret_cast<T*>(to));
          } else {
            pack_to(b, buffer);
            std::memcpy(to, buffer, (rank[next] - rank[b]) * sizeof(T));
          }
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
      blocks, kShareBlocks, threads_of(numel, sizeof(T), threads), [&](int64_t begin, int64_t end) {
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
#if FEDMAP_X86
        if (stream)
          _mm_sfence();
#endif
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
