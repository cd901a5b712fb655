// SPDX-License-Identifier: Apache-2.0
// The kernels of the active target against scalar code, for `ternaryforge doctor` and for machines
// without Python.
#pragma once

#include <string>
#include <vector>

namespace tf {

// Runs every kernel on a few hundred made cases. Returns one line per failure; empty when all is
// right.
std::vector<std::string> SelfTest();

}  // namespace tf
