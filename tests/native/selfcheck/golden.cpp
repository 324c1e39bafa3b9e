#include "check.h"
namespace selfcheck {
int check_golden(const char*) {
  return 0;
}
} // namespace selfcheck
