// SPDX-License-Identifier: Apache-2.0
// Detection and choice of the target; see targets.h.
#include "simd/targets.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "simd/targets.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "simd/dot-inl.h"

#if HWY_ARCH_X86
#include <cpuid.h>
#elif HWY_ARCH_ARM_A64 && defined(__linux__)
#include <sys/auxv.h>
#elif HWY_ARCH_ARM_A64 && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace tf::simd::HWY_NAMESPACE {

// The Highway target of this function, or 0 when the dot instruction gives a wrong sum.
int64_t ReachedTarget(DotKind dot, bool permute) {
  constexpr size_t kBytes = kDotBytes;
  alignas(64) uint8_t codes[kBytes];
  alignas(64) int8_t acts[kBytes];
  alignas(64) int32_t sums[kBytes / 4] = {};
  for (size_t i = 0; i < kBytes; ++i) {
    codes[i] = static_cast<uint8_t>(i % 3);
    acts[i] = static_cast<int8_t>(5 - static_cast<int>(i % 11));
  }
  WithDot(dot, [&]<DotKind kDot>() HWY_ATTR { DotOnce<kDot>(codes, acts, sums); });
#if HWY_TARGET == HWY_AVX3
  if (permute) {  // codes through a table that leaves them as they are
    alignas(64) uint8_t table[2 * kBytes];
    for (size_t i = 0; i < 2 * kBytes; ++i) table[i] = static_cast<uint8_t>(i);
    const DotBytesTag d8;
    const auto same =
        Permute128(hn::Load(d8, codes), hn::Load(d8, table), hn::Load(d8, table + kBytes));
    alignas(64) uint8_t found[kBytes];
    hn::Store(same, d8, found);
    for (size_t i = 0; i < kBytes; ++i) {
      if (found[i] != codes[i]) return 0;
    }
  }
#else
  if (permute) return 0;
#endif
  for (size_t lane = 0; lane < kBytes / 4; ++lane) {
    int32_t expected = 0;
    for (size_t i = 4 * lane; i < 4 * lane + 4; ++i) expected += codes[i] * acts[i];
    if (sums[lane] != expected) return 0;
  }
  return HWY_TARGET;
}

}  // namespace tf::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf::simd {
namespace {

struct Target {
  std::string_view name;
  int64_t highway;
  DotKind dot;
  bool permute;
  bool (*has_instructions)();
};

bool Always() { return true; }

#if HWY_ARCH_X86
// Highway has already seen to it that the operating system saves the vector registers.
bool HasAvx512Vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 11)) != 0;
}
bool HasAvx512VnniVbmi() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return HasAvx512Vnni() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (ecx & (1u << 1)) != 0;
}
bool HasAvxVnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & (1u << 4)) != 0;
}
#elif HWY_ARCH_ARM_A64 && defined(__linux__)
bool HasDotProd() { return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; }
bool HasI8mm() { return (getauxval(AT_HWCAP2) & (1ul << 13)) != 0; }
#elif HWY_ARCH_ARM_A64 && defined(__APPLE__)
bool HasFeature(const char* name) {
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has != 0;
}
bool HasDotProd() { return HasFeature("hw.optional.arm.FEAT_DotProd"); }
bool HasI8mm() { return HasFeature("hw.optional.arm.FEAT_I8MM"); }
#elif HWY_ARCH_ARM_A64
bool HasDotProd() { return false; }
bool HasI8mm() { return false; }
#endif

// Best first.
constexpr Target kTargets[] = {
#if HWY_ARCH_X86
    {"avx512-vbmi", HWY_AVX3, DotKind::kNative, true, HasAvx512VnniVbmi},
    {"avx512-vnni", HWY_AVX3, DotKind::kNative, false, HasAvx512Vnni},
    {"avx512", HWY_AVX3, DotKind::kPortable, false, Always},
    {"avx2-vnni", HWY_AVX2, DotKind::kNative, false, HasAvxVnni},
    {"avx2", HWY_AVX2, DotKind::kPortable, false, Always},
    {"sse4", HWY_SSE4, DotKind::kPortable, false, Always},
#elif HWY_ARCH_ARM
#if HWY_ARCH_ARM_A64
    {"neon-i8mm", TF_HWY_NEON, DotKind::kNative, false, HasI8mm},
    {"neon-dotprod", TF_HWY_NEON, DotKind::kSigned, false, HasDotProd},
#endif
    {"neon", TF_HWY_NEON, DotKind::kPortable, false, Always},
#endif
    {"scalar", HWY_TARGETS&(HWY_SCALAR | HWY_EMU128), DotKind::kPortable, false, Always},
};

HWY_EXPORT(ReachedTarget);

class Choice {
 public:
  Choice() {
    const int64_t available = hwy::SupportedTargets() & HWY_TARGETS;
    for (const Target& target : kTargets) {
      if ((available & target.highway) != 0 && target.has_instructions())
        supported_.push_back(&target);
    }
    const char* wanted = std::getenv("TERNARYFORGE_TARGET");
    Use(wanted == nullptr || *wanted == '\0' ? supported_.front()->name : std::string_view(wanted));
  }

  void Use(std::string_view name) {
    std::string known;
    for (const Target* target : supported_) {
      if (target->name == name) {
        hwy::SetSupportedTargetsForTest(target->highway);
        hwy::GetChosenTarget().Update(hwy::SupportedTargets());
        active_.store(target);
        return;
      }
      known += StrCat(known.empty() ? "" : ", ", target->name);
    }
    throw std::invalid_argument(
        StrCat("[target] this machine and build support ", known, "; got '", name, "'"));
  }

  const Target& active() const { return *active_.load(std::memory_order_relaxed); }
  const std::vector<const Target*>& supported() const { return supported_; }

 private:
  std::vector<const Target*> supported_;
  std::atomic<const Target*> active_{nullptr};
};

Choice& TheChoice() {
  static Choice choice;
  return choice;
}

}  // namespace

std::vector<std::string> SupportedTargets() {
  std::vector<std::string> names;
  for (const Target* target : TheChoice().supported()) names.emplace_back(target->name);
  return names;
}

std::string ActiveTarget() { return std::string(TheChoice().active().name); }

void UseTarget(std::string_view name) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  TheChoice().Use(name);
}

DotKind ActiveDot() { return TheChoice().active().dot; }

bool HasBytePermute() { return TheChoice().active().permute; }

std::string DispatchedTarget() {
  const DotKind dot = ActiveDot();
  const bool permute = HasBytePermute();
  const int64_t reached = HWY_DYNAMIC_DISPATCH(ReachedTarget)(dot, permute);
  for (const Target& target : kTargets) {
    if (target.highway == reached && target.dot == dot && target.permute == permute)
      return std::string(target.name);
  }
  return "none";
}

std::string CompilerVersion() {
#if defined(__clang__)
  return StrCat("clang ", __clang_major__, ".", __clang_minor__, ".", __clang_patchlevel__);
#elif defined(__GNUC__)
  return StrCat("g++ ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#else
  return "unknown";
#endif
}

std::string HighwayVersion() { return StrCat(HWY_MAJOR, ".", HWY_MINOR, ".", HWY_PATCH); }

}  // namespace tf::simd
#endif  // HWY_ONCE
