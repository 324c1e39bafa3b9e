// Mask bits as nibbles under rANS, one quantised density a tensor.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "core/bits.h"
#include "core/pool.h"
#include "entropy/entropy.h"
#include "entropy/mask_plan.h"
#include "entropy/rans.h"

namespace fedmap {
namespace {

void encode_piece(const uint32_t* words, int64_t numel, const CodedRun& run, const Piece& piece,
                  RansWriter* out) {
  const RansTable table = density_table(run.code);
  uint8_t tile[kTileBytes + 16];
  if (piece.lanes) {
    load_bits(words, numel, piece.bit, run.start + run.numel - piece.bit, tile);
    const int high = (piece.lanes - 1) % 2 * 4;
    uint8_t& last = tile[(piece.lanes - 1) / 2];
    const int beyond = (15 & ~used_bits(run)) << high;
    last = static_cast<uint8_t>((last & ~beyond) | filling(run) << high);
    rans_encode_part(tile, piece.lanes, table, out);
    return;
  }
  for (int64_t done = piece.steps; done > 0;) {
    const int64_t steps = std::min(kTileSteps, done);
    done -= steps;
    // Backwards in tiles is no pattern that the hardware foresees.
    const char* tile_before = reinterpret_cast<const char*>(words) +
                              (piece.bit + std::max<int64_t>(0, done - kTileSteps) * kStepBits) / 8;
    for (int64_t line = 0; line < kTileBytes; line += 64)
      __builtin_prefetch(tile_before + line);
    load_bits(words, numel, piece.bit + done * kStepBits, steps * kStepBits, tile);
    rans_encode(tile, steps, table, out);
  }
}

// Decodes one chunk, piece by piece.
class Cursor {
 public:
  Cursor(const MaskPlan& plan, int64_t begin, int64_t end, const RansReader& in, uint32_t* words)
      : plan_(plan), pieces_(pieces_of(plan, begin, end)), in_(in), words_(words) {
    enter();
  }

  // Decodes partial steps until whole ones or the end come next; false when the stream is broken.
  bool settle() {
    while (at_ < pieces_.size() && pieces_[at_].lanes) {
      const Piece& piece = pieces_[at_];
      const CodedRun& run = plan_.runs[piece.run];
      if (!rans_decode_part(tile_, piece.lanes, table_, &in_))
        return false;
      const int last = tile_[(piece.lanes - 1) / 2] >> (piece.lanes - 1) % 2 * 4;
      if ((last & 15 & ~used_bits(run)) != filling(run))
        return false;
      store_bits(tile_, piece.bit, run.start + run.numel - piece.bit, words_);
      ++at_;
      enter();
    }
    return left_ > 0 || in_.finished();
  }

  int64_t left() const { return left_; } // whole steps until the piece ends
  uint8_t* tile() { return tile_; }
  const RansTable* table() const { return &table_; }
  RansReader* reader() { return &in_; }

  // Takes `steps` whole steps that were decoded into tile().
  void flush(int64_t steps) {
    store_bits(tile_, bit_, steps * kStepBits, words_);
    bit_ += steps * kStepBits;
    left_ -= steps;
    if (!left_) {
      ++at_;
      enter();
    }
  }

 private:
  void enter() {
    left_ = 0;
    if (at_ == pieces_.size())
      return;
    const Piece& piece = pieces_[at_];
    table_ = density_table(plan_.runs[piece.run].code);
    if (!piece.lanes) {
      left_ = piece.steps;
      bit_ = piece.bit;
    }
  }

  const MaskPlan& plan_;
  std::vector<Piece> pieces_;
  RansReader in_;
  uint32_t* words_;
  size_t at_ = 0;
  int64_t left_ = 0, bit_ = 0;
  RansTable table_;
  uint8_t tile_[kTileBytes + 8];
};

// Decodes the rest of at most kMaxStreams chunks; false when one of them is broken.
bool drain(std::vector<Cursor>* cursors) {
  for (;;) {
    Cursor* live[kMaxStreams];
    uint8_t* tiles[kMaxStreams];
    const RansTable* tables[kMaxStreams];
    RansReader* readers[kMaxStreams];
    int n = 0;
    int64_t steps = kTileSteps;
    for (Cursor& cursor : *cursors) {
      if (!cursor.settle())
        return false;
      if (cursor.left()) {
        steps = std::min(steps, cursor.left());
        live[n] = &cursor;
        tiles[n] = cursor.tile();
        tables[n] = cursor.table();
        readers[n++] = cursor.reader();
      }
    }
    if (!n)
      return true;
    if (!rans_decode(n, tiles, steps, tables, readers))
      return false;
    for (int k = 0; k < n; ++k)
      live[k]->flush(steps);
  }
}

void fill_ones(uint32_t* words, int64_t start, int64_t numel) {
  uint8_t ones[kTileBytes + 8];
  std::memset(ones, 0xff, sizeof ones);
  for (int64_t done = 0; done < numel; done += 8 * kTileBytes)
    store_bits(ones, start + done, std::min(8 * kTileBytes, numel - done), words);
}

uint32_t u32_at(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

void put_u32(uint8_t* p, int64_t value) {
  const uint32_t small = static_cast<uint32_t>(value);
  std::memcpy(p, &small, 4);
}

} // namespace

int64_t encode_mask(const uint32_t* words, MaskRuns runs, const uint8_t* codes, int64_t chunk_steps,
                    uint8_t* out, int64_t capacity, int threads) {
  int64_t numel = 0, even = 0;
  for (int64_t r = 0; r < runs.count; ++r) {
    numel = std::max(numel, runs.start[r] + runs.numel[r]);
    even += codes[r] & kConstant ? 0 : runs.numel[r];
  }
  // Where ones are as likely as zeros all nibbles have one frequency: bits stay bits.
  if (even > 8 * capacity)
    return -1;
  const MaskPlan plan = plan_of(runs, codes);
  const int64_t chunks = (plan.steps + chunk_steps - 1) / chunk_steps;
  const MaskParts parts(runs.count, chunks);
  if (parts.words > capacity)
    return -1;
  put_u32(out, chunk_steps);
  put_u32(out + 4, chunks);
  std::memset(out + 8, 0, parts.directory - 8);
  std::memcpy(out + 8, codes, runs.count);
  threads = threads_for(numel, threads); // a bit takes as long as a byte elsewhere
  // Tasks are begun in order, so the end of the chunk before is known, or will be without this
  // one's help. To keep the words of all until then cost a copy, and fresh pages for it.
  std::vector<std::atomic<int64_t>> ends(chunks + 1);
  ends[0] = parts.words;
  std::atomic<bool> failed{false};
  const auto encode_chunk = [&](int64_t c) {
    // A symbol takes one word at most; only what is written of this is ever touched.
    static thread_local std::unique_ptr<uint16_t[]> scratch;
    if (!scratch)
      scratch.reset(new uint16_t[kMaxChunk * kLanes]);
    uint16_t* top = scratch.get() + kMaxChunk * kLanes;
    RansWriter writer(top);
    const std::vector<Piece> pieces =
        pieces_of(plan, c * chunk_steps, std::min(plan.steps, (c + 1) * chunk_steps));
    for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece)
      encode_piece(words, numel, plan.runs[piece->run], *piece, &writer);
    put_u32(out + parts.directory + 4 * c, top - writer.next);
    std::memcpy(out + parts.states + 4 * kLanes * c, writer.x, sizeof writer.x);
    const int64_t size = 2 * (top - writer.next);
    int64_t begin;
    while (!(begin = ends[c].load(std::memory_order_acquire)) && !failed)
      std::this_thread::yield();
    ends[c + 1].store(begin + size, std::memory_order_release);
    if (begin + size <= capacity)
      std::memcpy(out + begin, writer.next, size);
  };
  parallel_for(chunks, threads, [&](int64_t c) {
    try {
      encode_chunk(c);
    } catch (...) {
      failed = true;
      throw;
    }
  });
  return ends[chunks] <= capacity ? ends[chunks].load() : -1;
}

Fault decode_mask(const uint8_t* payload, int64_t size, MaskRuns runs, int64_t numel,
                  uint32_t* words, int threads) {
  if (size < MaskParts(runs.count, 0).directory)
    return {"expected a density for each tensor, got the end of the payload", size};
  const int64_t chunk_steps = u32_at(payload), chunks = u32_at(payload + 4);
  if (chunk_steps < kMinChunk || chunk_steps > kMaxChunk || (chunk_steps & (chunk_steps - 1)))
    return {"expected steps a chunk to be a power of two from 2^10 to 2^17", 0};
  const uint8_t* codes = payload + 8;
  for (int64_t r = 0; r < runs.count; ++r) {
    const int k = codes[r] & kConstant;
    if (k >= kDensities && k != kConstant)
      return {"unknown density code", 8 + r};
    if (!runs.numel[r] && codes[r] != kConstant)
      return {"expected the code of zeros for a tensor without bits", 8 + r};
  }
  for (int64_t i = 8 + runs.count; i < MaskParts(runs.count, 0).directory; ++i)
    if (payload[i])
      return {"expected padding to be zero", i};
  const MaskPlan plan = plan_of(runs, codes);
  if (chunks != (plan.steps + chunk_steps - 1) / chunk_steps)
    return {"the number of chunks disagrees with the densities", 4};
  const MaskParts parts(runs.count, chunks);
  if (size < parts.words)
    return {"expected directory and states, got the end of the payload", size};
  std::vector<int64_t> at(chunks + 1, parts.words);
  for (int64_t c = 0; c < chunks; ++c)
    at[c + 1] = at[c] + 2 * int64_t{u32_at(payload + parts.directory + 4 * c)};
  if (at[chunks] != size)
    return {"the directory's words disagree with the size of the payload", parts.directory};
  for (int64_t i = 0; i < kLanes * chunks; ++i) {
    const uint32_t x = u32_at(payload + parts.states + 4 * i);
    if (x < kStateLow || x >= kStateHigh)
      return {"a state that rANS cannot have", parts.states + 4 * i};
  }

  const int64_t total = mask_words(numel);
  threads = threads_for(numel, threads); // a bit takes as long as a byte elsewhere
  parallel_ranges(total, 1 << 16, threads, [&](int64_t begin, int64_t end) {
    std::memset(words + begin, 0, 4 * (end - begin));
  });
  for (int64_t r = 0; r < runs.count; ++r)
    if (codes[r] == (kOnesAreCommon | kConstant))
      fill_ones(words, runs.start[r], runs.numel[r]);
  const uint16_t* limit = reinterpret_cast<const uint16_t*>(payload + size);
  const auto sound = [&](int64_t first, int64_t last) {
    std::vector<Cursor> cursors;
    cursors.reserve(last - first);
    for (int64_t c = first; c < last; ++c) {
      RansReader in;
      std::memcpy(in.x, payload + parts.states + 4 * kLanes * c, sizeof in.x);
      in.next = reinterpret_cast<const uint16_t*>(payload + at[c]);
      in.end = reinterpret_cast<const uint16_t*>(payload + at[c + 1]);
      in.limit = limit;
      cursors.emplace_back(plan, c * chunk_steps, std::min(plan.steps, (c + 1) * chunk_steps), in,
                           words);
    }
    return drain(&cursors);
  };
  std::vector<uint8_t> broken(chunks, 0);
  for_each_group(chunks, threads, [&](int64_t first, int64_t last) {
    if (!sound(first, last))
      for (int64_t c = first; c < last; ++c)
        broken[c] = !sound(c, c + 1);
  });
  for (int64_t c = 0; c < chunks; ++c)
    if (broken[c])
      return {"words that do not decode", parts.directory + 4 * c};
  return {};
}

} // namespace fedmap
