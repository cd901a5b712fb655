// SPDX-License-Identifier: Apache-2.0
// Runs SelfTest on every target of this machine; exits with 1 on a failure. For cross-compiled
// builds.
#include <cstdio>

#include "kernels/self_test.h"
#include "simd/targets.h"

int main() {
  int failures = 0;
  for (const std::string& target : tf::simd::SupportedTargets()) {
    tf::simd::UseTarget(target);
    const std::vector<std::string> errors = tf::SelfTest();
    const bool reached = tf::simd::DispatchedTarget() == target;
    std::printf("%s: %s\n", target.c_str(),
                !reached         ? "not reached"
                : errors.empty() ? "ok"
                                 : "FAILED");
    for (const std::string& error : errors) std::printf("  %s\n", error.c_str());
    failures += errors.empty() && reached ? 0 : 1;
  }
  return failures == 0 ? 0 : 1;
}
