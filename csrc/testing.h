// All that a C++ test needs: CHECK(condition, printf-style message), and FAILED() for main's result.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition, ...)                                  \
  do {                                                         \
    if (!(condition) && ++failures() <= 20) {                  \
      std::fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);     \
      std::fprintf(stderr, __VA_ARGS__);                       \
      std::fprintf(stderr, "\n");                              \
    }                                                          \
  } while (0)

#define FAILED() (failures() != 0)
