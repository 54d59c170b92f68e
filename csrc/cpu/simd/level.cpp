// SPDX-License-Identifier: Apache-2.0
#include "level.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace kdci {
namespace {

SimdLevel supported_level() {
#if defined(KDCI_SIMD_X86)
  if (__builtin_cpu_supports("x86-64-v4")) {
    return __builtin_cpu_supports("avx512vnni") ? SimdLevel::avx512vnni
                                                : SimdLevel::avx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return SimdLevel::avx2;
  }
#endif
  return SimdLevel::baseline;
}

SimdLevel chosen_level() {
  const SimdLevel supported = supported_level();
  const char* wanted = std::getenv("KDCI_SIMD");
  if (wanted == nullptr) {
    return supported;
  }
  for (SimdLevel level :
       {SimdLevel::baseline, SimdLevel::avx2, SimdLevel::avx512}) {
    if (std::strcmp(wanted, simd_level_name(level)) == 0) {
      return level < supported ? level : supported;
    }
  }
  return supported;
}

} // namespace

SimdLevel simd_level() {
  static const SimdLevel level = chosen_level();
  return level;
}

bool divides_fast() {
#if defined(KDCI_SIMD_X86)
  static const bool fast = __builtin_cpu_is("amd") != 0;
  return fast;
#else
  return true;
#endif
}

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512vnni:
      return "avx512vnni";
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

} // namespace kdci
