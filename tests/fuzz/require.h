// SPDX-License-Identifier: Apache-2.0
// The assertion of the fuzzers.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace tf {

// Ends the process, which the fuzzer reports as a finding, unless `condition` holds.
inline void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

}  // namespace tf
