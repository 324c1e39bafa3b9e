// Each level's form: noise.cpp includes this once in each one's target region, after its `Words`,
// `times` and `roots`. The loops over doubles are for the compiler to vectorise.

// Philox4x32-10 of (pair, stream) for kPairs pairs: the first and the second 64 bits of each.
static void words(uint64_t pair, uint64_t stream, const uint64_t (&keys)[10][2], uint64_t* first,
                  uint64_t* second) {
  constexpr int64_t kLanes = sizeof(Words) / sizeof(uint64_t);
  for (int64_t i = 0; i < kPairs; i += kLanes) {
    uint64_t places[kLanes];
    for (int64_t k = 0; k < kLanes; ++k)
      places[k] = pair + static_cast<uint64_t>(i + k);
    Words a;
    std::memcpy(&a, places, sizeof a);
    Words b = a >> 32, c = Words{} + (stream & kLow), d = Words{} + (stream >> 32);
    a = a & kLow;
    for (const auto& key : keys) {
      const Words x = times(a, Words{} + 0xD2511F53u), y = times(c, Words{} + 0xCD9E8D57u);
      a = (y >> 32) ^ b ^ key[0];
      c = (x >> 32) ^ d ^ key[1];
      b = y & kLow;
      d = x & kLow;
    }
    a = a | b << 32;
    c = c | d << 32;
    std::memcpy(first + i, &a, sizeof a);
    std::memcpy(second + i, &c, sizeof c);
  }
}

template <int kTerms>
inline double polynomial(double x, const double (&terms)[kTerms]) {
  double total = terms[0];
#pragma GCC unroll 16
  for (int i = 1; i < kTerms; ++i)
    total = total * x + terms[i];
  return total;
}

// The normal numbers of kPairs pairs from `pair` on: the first of each, then the second.
static void normals(uint64_t pair, uint64_t seed, uint64_t stream, double* out) {
  uint64_t keys[10][2];
  for (uint64_t i = 0; i < 10; ++i) {
    keys[i][0] = ((seed & kLow) + i * 0x9E3779B9u) & kLow;
    keys[i][1] = ((seed >> 32) + i * 0xBB67AE85u) & kLow;
  }
  double radius[kPairs], cosine[kPairs], sine[kPairs];
  uint64_t firsts[kPairs], seconds[kPairs];
  words(pair, stream, keys, firsts, seconds);
  for (int64_t i = 0; i < kPairs; ++i) {
    const uint64_t second = seconds[i];
    const uint64_t bits = bits_of(2.0 - double_of(firsts[i] >> 12 | kOne));
    // 1 where the mantissa is above that of sqrt(2). Not by comparing doubles: a sum or product
    // that may not happen cannot be vectorised.
    const uint64_t upper = (kSqrt2 - (bits & kMantissa)) >> 63;
    const double m = double_of((bits & kMantissa) | (kOne - (upper << 52)));
    const double k = double_of(((bits >> 52) + upper) | kMagic) - (0x1p52 + 1023);
    const double s = (m - 1.0) / (m + 1.0);
    radius[i] = -(k * kLn4) - 4.0 * s * polynomial(s * s, kAtanh);
    const double angle = (double_of((second >> 10 & kMantissa) | kOne) - 1.5) * kQuarter;
    const double square = angle * angle;
    cosine[i] = polynomial(square, kCos);
    sine[i] = angle * polynomial(square, kSin);
  }
  roots(radius, kPairs);
  for (int64_t i = 0; i < kPairs; ++i) {
    const uint64_t c = bits_of(radius[i] * cosine[i]) ^ (seconds[i] & kSign);
    const uint64_t s = bits_of(radius[i] * sine[i]);
    const uint64_t swapped = (c ^ s) & (0 - (seconds[i] >> 62 & 1)); // no branch
    out[i] = double_of(c ^ swapped);
    out[kPairs + i] = double_of(s ^ swapped);
  }
}

// n elements, the first of which is the first of a group.
static void add_noise(float* values, int64_t n, double std, uint64_t group, uint64_t seed,
                      uint64_t stream) {
  double noise[2 * kPairs];
  for (int64_t i = 0; i < n; i += 2 * kPairs, ++group) {
    normals(group * kPairs, seed, stream, noise);
    const int64_t size = n - i < 2 * kPairs ? n - i : 2 * kPairs;
    for (int64_t k = 0; k < size; ++k)
      values[i + k] = static_cast<float>(static_cast<double>(values[i + k]) + noise[k] * std);
  }
}
