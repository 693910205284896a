// Argument checks of the C++ kernels: a failed PGOLF_CHECK throws std::invalid_argument, which Python sees as
// ValueError.
#pragma once
#include <sstream>
#include <stdexcept>

namespace pgolf {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace pgolf

// PGOLF_CHECK(n > 0, "slot: n must be > 0, got ", n)
#define PGOLF_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::pgolf::fail(__VA_ARGS__); \
  } while (0)
