// SPDX-License-Identifier: Apache-2.0
// Which Highway targets our kernels are compiled for. Include it before any Highway header.
//
//   kept           why
//   SCALAR/EMU128  the fallback of every CPU and our target "scalar". Highway picks one by compiler
//   and calls it
//                  HWY_BASELINE_SCALAR: SCALAR (one lane, fewer operations) for g++ before 12.3,
//                  which miscompiles EMU128, else EMU128
//   SSE4           every x86 CPU since 2011
//   AVX2           the first x86 target with fused multiply-add and F16C
//   AVX3           AVX-512 F, BW, CD, DQ, VL
//   NEON           every 64-bit ARM CPU
//
// All else is disabled, what future versions add included:
//   SSE2, SSSE3                     CPUs older than SSE4: the fallback serves them
//   AVX3_DL, AVX3_ZEN4, AVX3_SPR    add dot instructions, which we choose by our own CPU check;
//   AVX3_DL of Highway 1.0.3
//                                   lets g++ emit AVX-VNNI on CPUs that lack it
//   AVX10_2                         waits for hardware to test on
//   NEON with AES, NEON_BF16        NEON again, on fewer CPUs: newer Highway has NEON_WITHOUT_AES,
//   which is all we use SVE*, RVV, LASX                 vectors of unknown size cannot be members
//   of a struct, as `Lanes` has them PPC*, Z14, Z15, WASM*, LSX      nothing here is tested on
//   them: the fallback serves them
#pragma once

#ifdef HIGHWAY_HWY_DETECT_TARGETS_H_
#error "Include simd/highway_targets.h before Highway"
#endif

// A macro is expanded where it is used, so it may name what Highway defines below.
#define HWY_DISABLED_TARGETS \
  (~(HWY_SCALAR | HWY_EMU128 | HWY_SSE4 | HWY_AVX2 | HWY_AVX3 | TF_HWY_NEON))

// Without this, Highway leaves out the fallback where the compiler's baseline is better (64-bit
// ARM; x86 with -msse4.2 and so on), and tests could not force it. On plain x86-64 the fallback is
// the baseline, since SSE2 is disabled.
#define HWY_COMPILE_ALL_ATTAINABLE

#include "hwy/detect_targets.h"

#ifdef HWY_NEON_WITHOUT_AES
#define TF_HWY_NEON HWY_NEON_WITHOUT_AES
#else
#define TF_HWY_NEON HWY_NEON  // Highway 1.0.3 has one NEON target; it asks for AES
#endif
