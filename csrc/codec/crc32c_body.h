// The checksum by an instruction: crc32c.cpp includes this in each level that has one, after its
// `append_8`, which takes 8 bytes more into a checksum.

// The instruction gives a result three cycles later but takes a new operand every cycle: three
// stretches at once, joined by what appends a stretch of zeros.
template <int64_t kStretch>
static uint32_t three_stretches(const uint8_t*& data, int64_t& nbytes, uint32_t crc) {
  static const Multiplier append(power_of_bytes(kStretch));
  const int64_t ahead = read_ahead() ? 3 * kStretch : 0; // the next three
  for (; nbytes >= 3 * kStretch; nbytes -= 3 * kStretch, data += 3 * kStretch) {
    uint64_t first = crc, second = 0, third = 0;
    for (int64_t line = 0; line < kStretch; line += 64) {
      for (int64_t begin = line; begin < 3 * kStretch; begin += kStretch)
        ask(data + begin, ahead);
      for (int64_t i = line; i < line + 64; i += 8) {
        first = append_8(first, load_64(data + i));
        second = append_8(second, load_64(data + kStretch + i));
        third = append_8(third, load_64(data + 2 * kStretch + i));
      }
    }
    crc = append(append(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second)) ^
          static_cast<uint32_t>(third);
  }
  return crc;
}

static uint32_t checksum_by_instruction(const uint8_t* data, int64_t nbytes, uint32_t crc) {
  crc = three_stretches<4096>(data, nbytes, crc);
  crc = three_stretches<256>(data, nbytes, crc);
  for (; nbytes >= 8; nbytes -= 8, data += 8)
    crc = static_cast<uint32_t>(append_8(crc, load_64(data)));
  return scalar::checksum(data, nbytes, crc);
}
