// SPDX-License-Identifier: Apache-2.0
// The instruction sets that kernels are compiled for: which this CPU has, which one is in use,
// forcing one.
//
// A target of ours is a Highway target plus the way to multiply bytes: VNNI and the ARM dot
// instructions are chosen by our own CPU check, because Highway 1.0.3 has no sound target for them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tf::simd {

// How a kernel forms sums of u8 x i8 products. Kernels get it as an argument next to the dispatched
// function.
enum class DotKind : uint8_t {
  kPortable,  // what the Highway target has: pmaddubsw on x86, widening multiplies on NEON, a loop
              // elsewhere
  kSigned,    // sdot (ARM dotprod), which takes both operands as i8
  kNative,    // vpdpbusd (AVX512-VNNI, AVX-VNNI), usdot (ARM i8mm)
};

// Names of the targets that this CPU and build can run, best first: among "avx512-vbmi",
// "avx512-vnni", "avx512", "avx2-vnni", "avx2", "sse4", "neon-i8mm", "neon-dotprod", "neon",
// "scalar".
std::vector<std::string> SupportedTargets();

// The name of the target in use. The first call takes TERNARYFORGE_TARGET from the environment,
// else the best target; throws std::invalid_argument when that variable names no supported target.
std::string ActiveTarget();

// Uses `name` from now on, in the whole process. Throws std::invalid_argument with the supported
// names.
void UseTarget(std::string_view name);

// The dot kind of the active target.
DotKind ActiveDot();

// Whether the active target looks bytes up in tables of 128 (AVX512-VBMI, with VNNI).
bool HasBytePermute();

// The name of the target that dispatch really reaches: reported from inside the function compiled
// for it, and, for the dot, by executing its instruction. Equal to ActiveTarget() unless dispatch
// is broken.
std::string DispatchedTarget();

// What the kernels were compiled with: "g++ 12.2.0", "1.0.3".
std::string CompilerVersion();
std::string HighwayVersion();

}  // namespace tf::simd
