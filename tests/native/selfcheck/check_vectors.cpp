// tests/vectors/ops.txt, whose outputs are those of the references in plain torch: every level
// gives these bytes. Format: tests/vectors/op_vectors.py, whose package's tests read the same file.
#include <algorithm>
#include <cmath>
#include <map>
#include <sstream>

#include "accumulate/accumulate.h"
#include "check.h"
#include "clip/clip.h"
#include "core/bits.h"
#include "core/cpu.h"
#include "core/dtype.h"
#include "distances/distances.h"
#include "entropy/entropy.h"
#include "extract/extract.h"
#include "fixed/fixed.h"
#include "mask/mask.h"
#include "masked_step/segment.h"
#include "noise/noise.h"
#include "pack/pack.h"
#include "quantize/quantize.h"
#include "select/select.h"
#include "trimmed/trimmed.h"
#include "vector_case.h"

namespace selfcheck {
namespace {

const char kText[] =
#include "ops.inc" // ops.txt as string literals, by the Makefile
    ;

void run_select(const Case& c) {
  const Bitmap within = c.mask("within");
  const auto values = c.get<uint8_t>("values");
  Buffer<uint32_t> words(within.words.size());
  Buffer<int64_t> rank(within.rank.size());
  fedmap::select({{values.data(), within.numel, within.words.data(), words.data(), rank.data()}},
                 c.dtype("values"), within.nnz, c.integer("keep"), 1);
  c.compare("words", words);
}

void run_zero_pruned(const Case& c) {
  const Bitmap before = c.mask("before"), after = c.mask("mask");
  auto values = c.get<uint8_t>("values");
  fedmap::zero_pruned(values.data(), before.words.data(), after.words.data(), after.numel,
                      c.dtype("values"), 1);
  c.compare("values", values);
}

void run_pack(const Case& c) {
  const Bitmap mask = c.mask("mask");
  const auto values = c.get<uint8_t>("values");
  Buffer<uint8_t> packed = c.room(mask.nnz);
  fedmap::pack(values.data(), c.dtype("values"), mask.words.data(), mask.rank.data(), mask.numel,
               packed.data(), c.dtype("to"), 1);
  c.compare("packed", packed);
}

void run_unpack(const Case& c) {
  const Bitmap mask = c.mask("mask");
  const auto packed = c.get<uint8_t>("packed");
  Buffer<uint8_t> values = c.room(mask.numel);
  fedmap::unpack(packed.data(), c.dtype("packed"), mask.words.data(), mask.rank.data(), mask.numel,
                 values.data(), c.dtype("to"), 1);
  c.compare("values", values);
}

void run_extract(const Case& c) {
  const Bitmap child = c.mask("mask"), parent = c.mask("parent");
  Buffer<uint32_t> words(fedmap::mask_words(parent.nnz));
  Buffer<int64_t> rank(fedmap::mask_blocks(parent.nnz) + 1);
  fedmap::extract(child.words.data(), parent.words.data(), parent.rank.data(), parent.numel,
                  words.data(), rank.data(), 1);
  c.compare("words", words);
}

void run_deposit(const Case& c) {
  const Bitmap parent = c.mask("parent");
  const auto bits = c.get<uint32_t>("bits");
  Buffer<uint32_t> words(parent.words.size());
  Buffer<int64_t> rank(parent.rank.size());
  fedmap::deposit(bits.data(), parent.words.data(), parent.rank.data(), parent.numel, words.data(),
                  rank.data(), 1);
  c.compare("words", words);
}

// What both steps begin from.
struct Step {
  Bitmap mask;
  Buffer<uint8_t> values, gradient;
  Buffer<float> master;
  fedmap::Segment segment;

  explicit Step(const Case& c)
      : mask(c.mask("mask")), values(c.get<uint8_t>("values")),
        gradient(c.get<uint8_t>("gradient")),
        master(c.has("master") ? c.get("master") : Buffer<float>(0)),
        segment{0, mask.numel, reinterpret_cast<uintptr_t>(gradient.data()), 0} {}
  float* masters() { return master.size() ? master.data() : nullptr; }
  void compare(const Case& c) const {
    c.compare("values", values);
    if (master.size())
      c.compare("master", master);
  }
};

void run_masked_sgd(const Case& c) {
  Step s(c);
  Buffer<float> momentum = c.get("momentum_buffer");
  const double scalars[fedmap::kScalars] = {c.number("lr"), c.number("momentum"),
                                            c.number("dampening"), c.number("weight_decay")};
  fedmap::masked_sgd(s.values.data(), c.dtype("values"), s.mask.words.data(), s.mask.rank.data(),
                     s.mask.numel, s.mask.numel, &s.segment, 1, scalars, momentum.data(),
                     s.masters(), 1);
  s.compare(c);
  c.compare("momentum_buffer", momentum);
}

void run_masked_adamw(const Case& c) {
  Step s(c);
  Buffer<float> first = c.get("exp_avg"), second = c.get("exp_avg_sq");
  const double beta1 = c.number("beta1"), beta2 = c.number("beta2"), t = c.number("step");
  const double scalars[fedmap::kScalars] = {c.number("lr"),
                                            beta1,
                                            beta2,
                                            c.number("eps"),
                                            c.number("weight_decay"),
                                            std::pow(beta1, t),
                                            std::pow(beta2, t)};
  fedmap::masked_adamw(s.values.data(), c.dtype("values"), s.mask.words.data(), s.mask.rank.data(),
                       s.mask.numel, s.mask.numel, &s.segment, 1, scalars, first.data(),
                       second.data(), nullptr, s.masters(), 1);
  s.compare(c);
  c.compare("exp_avg", first);
  c.compare("exp_avg_sq", second);
}

// `count` vectors side by side in one tensor of bytes.
template <class T>
std::vector<const T*> rows(const Buffer<uint8_t>& bytes, int64_t count) {
  std::vector<const T*> made;
  for (int64_t k = 0; k < count; ++k)
    made.push_back(reinterpret_cast<const T*>(bytes.data() + bytes.size() / count * k));
  return made;
}

void run_weighted_mean(const Case& c) {
  const auto payloads = c.get<uint8_t>("payloads");
  const auto weights = c.get<double>("weights");
  const int dtype = c.dtype("payloads");
  const int64_t count = weights.size();
  const int64_t n = payloads.size() / fedmap::dtype_bytes(dtype) / count;
  Buffer<uint8_t> mean = c.room(n);
  fedmap::weighted_mean(rows<void>(payloads, count), dtype,
                        {weights.data(), weights.data() + count}, n, mean.data(), c.dtype("to"), 1);
  c.compare("mean", mean);
}

void run_accumulate(const Case& c) {
  auto sums = c.get<double>("sums");
  const auto payload = c.get<uint8_t>("payload");
  fedmap::accumulate_add(sums.data(), payload.data(), c.dtype("payload"), c.number("weight"),
                         sums.size(), 1);
  c.compare("sums", sums);
}

void run_accumulate_int8(const Case& c) {
  auto sums = c.get<double>("sums");
  const auto q = c.get<int8_t>("q");
  const Buffer<float> scales = c.get("scales");
  fedmap::accumulate_add_int8(sums.data(), q.data(), scales.data(), c.integer("block"),
                              c.number("weight"), sums.size(), 1);
  c.compare("sums", sums);
}

void run_cast(const Case& c) {
  const auto values = c.get<uint8_t>("values");
  const int64_t n = values.size() / fedmap::dtype_bytes(c.dtype("values"));
  Buffer<uint8_t> cast = c.room(n);
  c.compare("overflowed",
            fedmap::cast(values.data(), c.dtype("values"), cast.data(), c.dtype("to"), n, 1));
  c.compare("cast", cast);
}

void run_quantize_int8(const Case& c) {
  const Buffer<float> values = c.get("values");
  Buffer<float> residual = c.get("residual");
  const int64_t n = values.size(), block = c.integer("block");
  Buffer<int8_t> q(n, 1);
  Buffer<float> scales((n + block - 1) / block, 1);
  fedmap::quantize_int8(values.data(), n, block, q.data(), scales.data(), residual.data(), 1);
  c.compare("q", q);
  c.compare("scales", scales);
  c.compare("residual", residual);
}

void run_dequantize_int8(const Case& c) {
  const auto q = c.get<int8_t>("q");
  const Buffer<float> scales = c.get("scales");
  Buffer<float> values(q.size(), 1);
  fedmap::dequantize_int8(q.data(), scales.data(), c.integer("block"), q.size(), values.data(), 1);
  c.compare("values", values);
}

void run_trimmed_mean(const Case& c) {
  const auto vectors = c.get<uint8_t>("vectors");
  const int64_t count = c.integer("count"), n = vectors.size() / 4 / count;
  Buffer<float> mean(n, 1);
  fedmap::trimmed_mean(rows<float>(vectors, count), static_cast<int>(c.integer("trim")), n,
                       mean.data(), 1);
  c.compare("mean", mean);
}

void run_squared_distances(const Case& c) {
  const auto vectors = c.get<uint8_t>("vectors");
  const int64_t count = c.integer("count");
  Buffer<double> among(count * count);
  fedmap::squared_distances(rows<float>(vectors, count), {}, vectors.size() / 4 / count,
                            among.data(), 1);
  c.compare("among", among);
}

void run_clip_difference(const Case& c) {
  Buffer<float> values = c.get("values");
  const Buffer<float> start = c.get("start");
  fedmap::clip_difference(values.data(), start.data(), values.size(), c.number("max_norm"), 1);
  c.compare("values", values);
}

void run_add_gaussian(const Case& c) {
  Buffer<float> values = c.get("values");
  fedmap::add_gaussian(values.data(), values.size(), c.number("std"),
                       static_cast<uint64_t>(c.integer("seed")),
                       static_cast<uint64_t>(c.integer("stream")), 1);
  c.compare("values", values);
}

void run_to_fixed(const Case& c) {
  const Buffer<float> values = c.get("values");
  Buffer<int32_t> steps(values.size(), 1);
  c.compare("beyond",
            fedmap::to_fixed(values.data(), values.size(), c.number("clip"), c.number("scale"),
                             static_cast<int32_t>(c.integer("weight")), steps.data(), 1));
  c.compare("steps", steps);
}

void run_from_fixed(const Case& c) {
  const auto steps = c.get<int32_t>("steps");
  Buffer<float> values(steps.size(), 1);
  fedmap::from_fixed(steps.data(), steps.size(), c.number("divisor"), values.data(), 1);
  c.compare("values", values);
}

// The first `size` bytes, as a buffer of that size.
Buffer<uint8_t> written(const Buffer<uint8_t>& room, int64_t size) {
  Buffer<uint8_t> payload(std::max<int64_t>(size, 0));
  std::copy_n(room.data(), payload.size(), payload.data());
  return payload;
}

void run_encode_mask(const Case& c) {
  const Bitmap mask = c.mask("mask");
  const auto codes = c.get<uint8_t>("codes");
  const int64_t start = 0;
  Buffer<uint8_t> room(mask.numel + 4096);
  const int64_t size =
      fedmap::encode_mask(mask.words.data(), {&start, &mask.numel, 1}, codes.data(),
                          c.integer("chunk"), room.data(), room.size(), 1);
  c.compare("payload", written(room, size));
}

void run_encode_values(const Case& c) {
  const auto values = c.get<uint8_t>("values");
  const int dtype = c.dtype("values");
  Buffer<uint8_t> room(2 * values.size() + 8192);
  const int64_t size =
      fedmap::encode_values(values.data(), dtype, values.size() / fedmap::dtype_bytes(dtype),
                            room.data(), room.size(), 1);
  c.compare("payload", written(room, size));
}

const std::map<std::string, void (*)(const Case&)> kRuns = {
    {"select", run_select},
    {"zero_pruned", run_zero_pruned},
    {"pack", run_pack},
    {"unpack", run_unpack},
    {"extract", run_extract},
    {"deposit", run_deposit},
    {"masked_sgd", run_masked_sgd},
    {"masked_adamw", run_masked_adamw},
    {"weighted_mean", run_weighted_mean},
    {"accumulate", run_accumulate},
    {"accumulate_int8", run_accumulate_int8},
    {"cast", run_cast},
    {"quantize_int8", run_quantize_int8},
    {"dequantize_int8", run_dequantize_int8},
    {"trimmed_mean", run_trimmed_mean},
    {"squared_distances", run_squared_distances},
    {"clip_difference", run_clip_difference},
    {"add_gaussian", run_add_gaussian},
    {"to_fixed", run_to_fixed},
    {"from_fixed", run_from_fixed},
    {"encode_mask", run_encode_mask},
    {"encode_values", run_encode_values},
};

} // namespace

void check_vectors() {
  std::istringstream text(kText);
  int number = 0;
  for (std::string line; std::getline(text, line);) {
    std::istringstream words(line);
    Vector vector;
    words >> vector.op;
    vector.given = fields(words);
    vector.wanted = fields(words);
    ++number;
    for (const std::string& level : fedmap::isa_levels()) {
      fedmap::set_isa(level);
      const std::string where = "ops.txt, line " + std::to_string(number) + ", " + vector.op;
      kRuns.at(vector.op)(Case(vector, where + " " + level));
    }
  }
}

} // namespace selfcheck
