// One line of tests/vectors/ops.txt: its inputs as buffers, and the comparison of what came out.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>

#include "check.h"
#include "core/bits.h"
#include "core/dtype.h"
#include "mask/mask.h"

namespace selfcheck {

// Bytes off an alignment of 64: off a vector's, but not off that of any element.
constexpr int64_t kShift = 8;

using Words = std::map<std::string, std::string>;

struct Vector {
  std::string op;
  Words given, wanted;
};

inline Words fields(std::istringstream& line) {
  Words found;
  for (std::string word; line >> word && word != "->";) {
    const size_t at = word.find('=');
    found[word.substr(0, at)] = word.substr(at + 1);
  }
  return found;
}

template <class T>
Buffer<T> tensor(const std::string& text) {
  const size_t begin = text.find(':') + 1;
  const auto size = static_cast<int64_t>((text.size() - begin) / 2);
  Buffer<T> made(size / int64_t(sizeof(T)), kShift / int64_t(sizeof(T)));
  auto* bytes = reinterpret_cast<uint8_t*>(made.data());
  for (int64_t i = 0; i < size; ++i)
    bytes[i] = static_cast<uint8_t>(
        std::stoi(text.substr(begin + 2 * static_cast<size_t>(i), 2), nullptr, 16));
  return made;
}

inline int dtype_named(const std::string& text) { // of a dtype, or of a tensor
  const std::string name = text.substr(0, text.find(':'));
  return name == "float32"   ? fedmap::kFloat32
         : name == "float16" ? fedmap::kFloat16
                             : fedmap::kBfloat16;
}

// One vector's inputs, and the comparison of what came out.
class Case {
 public:
  Case(const Vector& vector, const std::string& where) : v_(vector), where_(where) {}

  const std::string& text(const char* name) const { return v_.given.at(name); }
  bool has(const char* name) const { return v_.given.count(name) > 0; }
  int64_t integer(const char* name) const { return std::atoll(text(name).c_str()); }
  double number(const char* name) const { return std::strtod(text(name).c_str(), nullptr); }
  int dtype(const char* name) const { return dtype_named(text(name)); }
  template <class T = float>
  Buffer<T> get(const char* name) const {
    return tensor<T>(text(name));
  }
  Bitmap mask(const char* name, int64_t numel) const {
    Bitmap made{get<uint32_t>(name), Buffer<int64_t>(fedmap::mask_blocks(numel) + 1), numel, 0};
    made.nnz = fedmap::rank_index(made.words.data(), numel, made.rank.data(), 1);
    return made;
  }
  Bitmap mask(const char* name) const { return mask(name, integer("numel")); }
  // Room for elements of the dtype that `to` names.
  Buffer<uint8_t> room(int64_t n) const {
    return Buffer<uint8_t>(n * fedmap::dtype_bytes(dtype("to")), kShift);
  }

  template <class T>
  void compare(const char* name, const Buffer<T>& got) const {
    const Buffer<uint8_t> wanted = tensor<uint8_t>(v_.wanted.at(name));
    const int64_t size = got.size() * int64_t(sizeof(T));
    expect(size == wanted.size() &&
               !std::memcmp(got.data(), wanted.data(), static_cast<size_t>(size)),
           where_ + ": `" + name + "` is not the reference's");
    expect(got.intact(), where_ + ": wrote outside of `" + name + "`");
  }
  void compare(const char* name, int64_t got) const {
    expect(got == std::atoll(v_.wanted.at(name).c_str()),
           where_ + ": `" + name + "` is not the reference's");
  }

 private:
  const Vector& v_;
  const std::string where_;
};

} // namespace selfcheck
