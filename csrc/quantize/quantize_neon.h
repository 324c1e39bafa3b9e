// The `neon` level of casts and int8 codes: quantize.cpp includes this beside its other levels.
// No store of baseline ARM goes past the cache for sure: kStream changes nothing.
namespace neon {

template <class From, class To, bool>
static int64_t cast(const From* src, To* dst, int64_t n) {
  uint32x4_t count = vdupq_n_u32(0);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const float32x4_t x[2] = {load(src + i), load(src + i + 4)};
    for (int k = 0; k < 2; ++k) {
      if constexpr (sizeof(To) < sizeof(float)) {
        // All ones, which is -1, less all ones.
        count = vaddq_u32(count, vsubq_u32(not_finite<float>(x[k]), not_finite<To>(x[k])));
      }
      store(dst + i + 4 * k, x[k]);
    }
  }
  return vaddvq_u32(count) + scalar::cast_from(i, src, dst, n);
}

template <class T>
static bool finite(const T* src, int64_t n) {
  int64_t i = 0;
  uint32x4_t bad = vdupq_n_u32(0);
  for (; i + 8 <= n; i += 8) {
    bad = vorrq_u32(bad, not_finite<float>(load(src + i)));
    bad = vorrq_u32(bad, not_finite<float>(load(src + i + 4)));
  }
  return !vmaxvq_u32(bad) && scalar::finite_from(i, src, n);
}

// max(most, |x|), which stays as it is where x is NaN, as std::max does.
static float32x4_t larger(float32x4_t most, float32x4_t x) {
  const float32x4_t magnitude = vabsq_f32(x);
  return vbslq_f32(vcgtq_f32(magnitude, most), magnitude, most);
}

static float largest(const float* src, float* residual, int64_t n) {
  float32x4_t most[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 2; ++k) {
      float32x4_t x = load(src + i + 4 * k);
      if (residual)
        store(residual + i + 4 * k, x += load(residual + i + 4 * k));
      most[k] = larger(most[k], x);
    }
  return scalar::largest_from(i, vmaxvq_f32(larger(most[0], most[1])), src, residual, n);
}

static void codes(const float* x, float scale, int8_t* q, float* residual, int64_t n) {
  int64_t i = 0;
  const float32x4_t most = vdupq_n_f32(127), least = vdupq_n_f32(-127);
  for (; i + 8 <= n; i += 8) {
    int16x4_t words[2];
    for (int k = 0; k < 2; ++k) {
      const float32x4_t value = load(x + i + 4 * k);
      const float32x4_t code = vminq_f32(vmaxq_f32(vrndnq_f32(value / scale), least), most);
      words[k] = vmovn_s32(vcvtq_s32_f32(code));
      if (residual)
        store(residual + i + 4 * k, value - code * scale);
    }
    vst1_s8(q + i, vmovn_s16(vcombine_s16(words[0], words[1])));
  }
  scalar::codes_from(i, x, scale, q, residual, n);
}

using scalar::dequantize; // of which compilers make the same vectors

} // namespace neon
