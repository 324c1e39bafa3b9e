// Each level's form: fixed.cpp includes this once in each one's target region. The loops are for
// the compiler to vectorise.
static int64_t to_fixed(const float* values, int64_t n, double clip, double scale, int32_t weight,
                        int32_t* out) {
  constexpr double kRound = 0x1.8p52; // added and taken away: rounds to an integer, halves to even
  int64_t beyond = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = values[i];
    double y = x < -clip ? -clip : x;
    y = y > clip ? clip : y;
    beyond += y != x;
    out[i] = static_cast<int32_t>((y * scale + kRound) - kRound) * weight;
  }
  return beyond;
}

static void from_fixed(const int32_t* sums, int64_t n, double divisor, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<float>(static_cast<double>(sums[i]) / divisor);
}
