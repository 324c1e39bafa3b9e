// Means of middle values, and squared distances.
#include "check.h"
#include "core/dtype.h"
#include "distances/distances.h"
#include "trimmed/trimmed.h"

namespace selfcheck {
namespace {

// `count` vectors of n elements, most of them off an alignment.
struct Vectors {
  std::vector<Buffer<float>> held;
  std::vector<const float*> data;

  Vectors(int count, int64_t n, uint64_t seed, Kind kind) {
    for (int c = 0; c < count; ++c) {
      held.emplace_back(n, c % 3);
      fill(held.back().data(), fedmap::kFloat32, n, seed + static_cast<uint64_t>(c), kind);
    }
    for (const Buffer<float>& vector : held)
      data.push_back(vector.data());
  }
};

void check_trimmed_mean(int64_t n, int count, int trim, Kind kind,
                        const std::vector<int>& threads) {
  const Vectors vectors(count, n, 51, kind);
  compare(
      label("trimmed mean", n) + " of " + std::to_string(count) + " less " + std::to_string(trim) +
          " " + name_of(kind),
      [&](int t, Outcome& out) {
        Buffer<float> mean(n, n % 2);
        out.add_value(fedmap::trimmed_mean(vectors.data, trim, n, mean.data(), t));
        out.add_results(mean);
      },
      threads);
}

void check_squared_distances(int64_t n, int count, Kind kind, const std::vector<int>& threads) {
  const Vectors vectors(count, n, 151, kind);
  compare(
      label("distances", n) + " of " + std::to_string(count) + " " + name_of(kind),
      [&](int t, Outcome& out) {
        Buffer<double> among(int64_t{count} * count), to_one(count);
        fedmap::squared_distances(vectors.data, {}, n, among.data(), t);
        fedmap::squared_distances(vectors.data, {vectors.data[0]}, n, to_one.data(), t);
        out.add_results(among);
        out.add_results(to_one);
      },
      threads);
}

} // namespace

void check_trimmed() {
  for (int64_t n : edges())
    if (n < 3000)
      for (Kind kind : kKinds)
        check_trimmed_mean(n, n % 5 == 0 ? 10 : 3, n % 2, kind, {});
  for (int count = 1; count <= 70; ++count)
    check_trimmed_mean(77, count, (count - 1) / (2 + count % 3), Kind::special, {});
  for (int count : {128, 129, 300})
    check_trimmed_mean(70, count, count / 3, Kind::normal, {});
  check_trimmed_mean(kLarge / 4, 7, 1, Kind::normal, thread_counts());
  check_trimmed_mean(kLarge / 8, 40, 19, Kind::ties, thread_counts());
}

void check_distances() {
  for (int64_t n : edges())
    for (Kind kind : kKinds)
      check_squared_distances(n, 3, kind, {});
  check_squared_distances(70, 70, Kind::normal, {});
  check_squared_distances(kLarge / 4, 5, Kind::normal, thread_counts());
}

} // namespace selfcheck
