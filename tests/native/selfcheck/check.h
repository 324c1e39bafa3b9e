// What the parts of the self-check share: inputs from a seed, buffers that notice overruns, and the
// comparison of every ISA level and thread count with the scalar level on one thread.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace selfcheck {

// splitmix64 by position.
inline uint64_t random_at(uint64_t seed, uint64_t i) {
  uint64_t z = seed * 0xD1B54A32D192ED03u + (i + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

// n elements of type T between two guards, `shift` elements off an alignment of 64 bytes. The
// memory starts as a pattern, so that what a kernel did not write shows up in a comparison.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int64_t shift = 0) : n_(n) {
    raw_.assign(static_cast<size_t>(2 * kGuard + 64 + (n + shift) * int64_t(sizeof(T))), kFill);
    const uintptr_t at = reinterpret_cast<uintptr_t>(raw_.data()) + kGuard;
    start_ = kGuard + (64 - at % 64) % 64 + static_cast<size_t>(shift) * sizeof(T);
  }
  T* data() { return reinterpret_cast<T*>(raw_.data() + start_); }
  const T* data() const { return reinterpret_cast<const T*>(raw_.data() + start_); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return n_; }
  bool intact() const {
    const size_t end = start_ + static_cast<size_t>(n_) * sizeof(T);
    for (size_t i = 0; i < raw_.size(); ++i)
      if ((i < start_ || i >= end) && raw_[i] != kFill)
        return false;
    return true;
  }

 private:
  static constexpr int64_t kGuard = 256;
  static constexpr uint8_t kFill = 0xA5;
  int64_t n_;
  size_t start_;
  std::vector<uint8_t> raw_;
};

// What one run of a kernel left: its outputs as bytes, and whether it wrote outside of them.
struct Outcome {
  std::vector<uint8_t> bytes;
  bool intact = true;

  template <class T>
  void add(const Buffer<T>& buffer) {
    add(buffer, buffer.size());
  }
  // Values of a dtype, as add_results: the 16-bit ones have one NaN each already.
  void add_results(const Buffer<uint8_t>& values, int dtype);
  template <class T>
  void add(const Buffer<T>& buffer, int64_t n) { // its first n elements alone are a result
    append(buffer.data(), static_cast<size_t>(n) * sizeof(T));
    intact = intact && buffer.intact();
  }
  // Results of arithmetic: any NaN is as good as another, since its sign and payload are those of
  // whichever operand the compiler put first.
  void add_results(const Buffer<float>& buffer) { add_canonical<uint32_t>(buffer, 0x7f800000u); }
  void add_results(const Buffer<double>& buffer) {
    add_canonical<uint64_t>(buffer, uint64_t{0x7ff} << 52);
  }
  template <class T>
  void add_value(T value) {
    append(&value, sizeof value);
  }

 private:
  template <class Bits, class T>
  void add_canonical(const Buffer<T>& buffer, Bits infinity) {
    for (int64_t i = 0; i < buffer.size(); ++i) {
      Bits bits;
      std::memcpy(&bits, &buffer[i], sizeof bits);
      add_value((bits << 1) > (infinity << 1) ? ~Bits{0} : bits);
    }
    intact = intact && buffer.intact();
  }
  void append(const void* data, size_t size) {
    const auto* from = static_cast<const uint8_t*>(data);
    bytes.insert(bytes.end(), from, from + size);
  }
};

// Fewer sizes and thread counts, of all that is checked.
extern bool is_short;

using Run = std::function<void(int threads, Outcome& outcome)>;

// Runs the kernel at the scalar level on one thread, then at each level and thread count, and
// reports every outcome that differs. `threads`: empty for one thread alone.
void compare(const std::string& name, const Run& run, const std::vector<int>& threads = {});
// Notes a failure; the program goes on and ends with status 1.
void fail(const std::string& message);
// One comparison more, which fails unless it holds.
void expect(bool holds, const std::string& message);

// Around every bit, word, vector and block edge; and a size that takes several threads.
const std::vector<int64_t>& edges();
constexpr int64_t kLarge = 700'003;
const std::vector<int>& thread_counts(); // 1, 2, 3, 7

// Values by kind: "normal" sizes over many exponents; "ties", a few magnitudes; "special": zeros,
// subnormals, infinities, NaN, and what rounds to the edges of the 16-bit types.
enum class Kind { normal, ties, special };
constexpr Kind kKinds[] = {Kind::normal, Kind::ties, Kind::special};
const char* name_of(Kind kind);
const char* name_of_dtype(int dtype);
float float_at(uint64_t seed, uint64_t i, Kind kind);
// n values of a dtype as bytes; 16-bit values are the float32 ones narrowed.
void fill(void* out, int dtype, int64_t n, uint64_t seed, Kind kind);

struct Bitmap {
  Buffer<uint32_t> words;
  Buffer<int64_t> rank;
  int64_t numel, nnz;
};
// Each bit is set with the probability `density`; those past numel are zero.
Bitmap random_bitmap(int64_t numel, double density, uint64_t seed);

inline std::string label(const char* kernel, int64_t n) {
  return std::string(kernel) + " n=" + std::to_string(n);
}

// The checks, by stem.
void check_masks();
void check_extract();
void check_select();
void check_pack();
void check_steps();
void check_accumulate();
void check_quantize();
void check_crc();
void check_entropy();
void check_trimmed();
void check_distances();
void check_private();
void check_vectors();

} // namespace selfcheck
