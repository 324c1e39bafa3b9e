// Each level's form: clip.cpp includes this once in each one's target region. The loops are for the
// compiler to vectorise; what they add up, and in which order, is the same at any width.
inline double sum_of_halves(double* lanes) {
  for (int64_t half = kClipLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      lanes[i] += lanes[i + half];
  return lanes[0];
}

// Of a block of at most kClipBlock elements.
static double squares(const float* values, const float* start, int64_t n) {
  double lanes[kClipLanes] = {};
  int64_t i = 0;
  for (; i + kClipLanes <= n; i += kClipLanes)
    for (int64_t k = 0; k < kClipLanes; ++k) {
      const double x = static_cast<double>(values[i + k]) - static_cast<double>(start[i + k]);
      lanes[k] += x * x;
    }
  for (int64_t k = 0; i + k < n; ++k) {
    const double x = static_cast<double>(values[i + k]) - static_cast<double>(start[i + k]);
    lanes[k] += x * x;
  }
  return sum_of_halves(lanes);
}

static void shorten(float* values, const float* start, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double at = start[i];
    values[i] = static_cast<float>(at + (static_cast<double>(values[i]) - at) * factor);
  }
}
