// Every kernel that module.cpp binds. Arguments were checked in Python; contracts are in
// fedmap_sparse/ops. Lengths count elements unless named otherwise; `threads` <= 0 means all of
// the machine's. Results do not depend on the ISA level or on `threads`.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace fedmap {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kInt8 = 3 };

inline int64_t dtype_bytes(int dtype) {
  return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2;
}

// Rank index: entry b counts the survivors before element kBlock * b; the last is their total.
constexpr int64_t kBlock = 2048;
constexpr int64_t kBlockWords = kBlock / 32;

inline int64_t mask_words(int64_t numel) {
  return (numel + 31) / 32;
}
inline int64_t mask_blocks(int64_t numel) {
  return (numel + kBlock - 1) / kBlock;
}

// mask.cpp
int64_t rank_index(const uint32_t* words, int64_t numel, int64_t* rank, int threads);
void mask_from_bools(const uint8_t* bools, int64_t numel, uint32_t* words, int threads);
void mask_to_bools(const uint32_t* words, int64_t numel, uint8_t* bools, int threads);
bool mask_subset(const uint32_t* a, const uint32_t* b, int64_t numel, int threads);
std::array<uint64_t, 2> mask_digest(const uint32_t* words, int64_t numel, int threads);

int64_t count_bits(const uint32_t* words, int64_t count);
// The two halves of rank_index: the survivors of each block, and their sums before each.
void count_blocks(const uint32_t* words, int64_t count, int64_t* counts);
int64_t sum_ranks(int64_t* rank, int64_t blocks);

// select.cpp
struct SelectInput {
  const void* values;
  int64_t numel;
  const uint32_t* within; // null: every element
  uint32_t* words;
  int64_t* rank; // null: only the threshold is wanted
};
uint32_t select(const std::vector<SelectInput>& inputs, int dtype, int64_t eligible, int64_t keep,
                int threads);
// How often the calling thread's last selection read its values: 1 usually, 4 at most. (Where the
// input fits L1, what it reads there is not counted.)
int select_reads();

// prune.cpp
void zero_pruned(void* values, const uint32_t* before, const uint32_t* after, int64_t numel,
                 int dtype, int threads);

// pack.cpp
int64_t pack(const void* values, int dtype, const uint32_t* words, const int64_t* rank,
             int64_t numel, void* out, int out_dtype, int threads);
void unpack(const void* packed, int packed_dtype, const uint32_t* words, const int64_t* rank,
            int64_t numel, void* out, int out_dtype, int threads);

// deposit.cpp
void extract(const uint32_t* child, const uint32_t* parent, const int64_t* parent_rank,
             int64_t numel, uint32_t* out, int64_t* rank, int threads);
void deposit(const uint32_t* kept, const uint32_t* parent, const int64_t* parent_rank,
             int64_t numel, uint32_t* out, int64_t* rank, int threads);

// masked_sgd.cpp, masked_adamw.cpp
struct Segment {
  int64_t offset, numel;
  uintptr_t gradient; // 0: the parameter is skipped, its state untouched
  int64_t flags;
};
enum SegmentFlags : int64_t { kNesterov = 1, kMaximize = 2, kFirst = 4, kAmsgrad = 8 };
constexpr int kScalars = 8; // float64 hyper-parameters for each segment
void masked_sgd(void* values, int dtype, const uint32_t* words, const int64_t* rank,
                int64_t prunable, int64_t numel, const Segment* segments, int64_t nseg,
                const double* scalars, float* momentum, float* master, int threads);
void masked_adamw(void* values, int dtype, const uint32_t* words, const int64_t* rank,
                  int64_t prunable, int64_t numel, const Segment* segments, int64_t nseg,
                  const double* scalars, float* exp_avg, float* exp_avg_sq, float* max_exp_avg_sq,
                  float* master, int threads);

// accumulate.cpp
int64_t weighted_mean(const std::vector<const void*>& payloads, int dtype,
                      const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                      int threads);
int64_t weighted_mean_int8(const std::vector<const int8_t*>& payloads,
                           const std::vector<const float*>& scales, int64_t block,
                           const std::vector<double>& weights, int64_t n, void* out, int out_dtype,
                           int threads);
void accumulate_add(double* acc, const void* payload, int dtype, double weight, int64_t n,
                    int threads);
void accumulate_add_int8(double* acc, const int8_t* payload, const float* scales, int64_t block,
                         double weight, int64_t n, int threads);
int64_t accumulate_mean(const double* acc, double total_weight, int64_t n, void* out, int out_dtype,
                        int threads);

// quantize.cpp
int64_t cast(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t n, int threads);
bool all_finite(const void* src, int dtype, int64_t n, int threads);
void quantize_int8(const float* src, int64_t n, int64_t block, int8_t* q, float* scales,
                   float* residual, int threads);
void dequantize_int8(const int8_t* q, const float* scales, int64_t block, int64_t n, float* dst,
                     int threads);

// crc32c.cpp
uint32_t crc32c(const void* data, int64_t nbytes, uint32_t crc, int threads);

// stream.cpp: the floors that benchmarks measure beside each case
uint64_t stream_read(const void* src, int64_t nbytes, int threads);
void stream_copy(const void* src, void* dst, int64_t nbytes, int threads);
void stream_inplace(void* buf, int64_t nbytes, int threads);
void stream_touched(float* buf, const uint32_t* words, int64_t numel, int threads);

} // namespace fedmap
