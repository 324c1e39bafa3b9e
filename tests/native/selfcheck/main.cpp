// Every kernel at every ISA level of this processor against the scalar level, bit for bit, and each
// level against vectors from the references in plain torch. No Python, no torch.
//
//   selfcheck [--short] [PART ...]    status 0 when all is well
#include <cstdio>
#include <cstring>
#include <string>

#include "check.h"
#include "core/cpu.h"

namespace selfcheck {
int report();
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  selfcheck::is_short = argc > 1 && !std::strcmp(argv[1], "--short");
  const int first = selfcheck::is_short ? 2 : 1;
  std::string levels;
  for (const std::string& level : fedmap::isa_levels())
    levels += " " + level;
  std::printf("levels:%s\n", levels.c_str());
  const struct {
    const char* name;
    void (*run)();
  } parts[] = {
      {"masks", selfcheck::check_masks},         {"extract", selfcheck::check_extract},
      {"select", selfcheck::check_select},       {"pack", selfcheck::check_pack},
      {"steps", selfcheck::check_steps},         {"accumulate", selfcheck::check_accumulate},
      {"quantize", selfcheck::check_quantize},   {"crc", selfcheck::check_crc},
      {"entropy", selfcheck::check_entropy},     {"trimmed", selfcheck::check_trimmed},
      {"distances", selfcheck::check_distances}, {"private", selfcheck::check_private},
      {"vectors", selfcheck::check_vectors}};
  for (const auto& part : parts) {
    bool wanted = argc == first;
    for (int k = first; k < argc; ++k)
      wanted = wanted || !std::strcmp(argv[k], part.name);
    if (!wanted)
      continue;
    std::printf("%s\n", part.name);
    part.run();
  }
  return selfcheck::report();
}
