// SPDX-License-Identifier: Apache-2.0
//
// Which SIMD instruction set the CPU kernels run with. Each file in this
// folder that defines kernels is compiled once for every level, in a namespace
// of the level's name, and one of the copies is picked when the library loads.
#pragma once

#if defined(__x86_64__)
#define KDCI_SIMD_X86 1
#endif

namespace kdci {

/// avx512vnni adds products of 16-bit integers, twice as many as of floats.
enum class SimdLevel { baseline, avx2, avx512, avx512vnni };

/// The best level this processor has; the environment variable
/// KDCI_SIMD=baseline|avx2|avx512|avx512vnni, read once, lowers it (for tests).
SimdLevel simd_level();

/// Whether there are products of integers for values of type T.
template <typename T>
static inline bool has_integer_kernels() {
  return sizeof(T) == 4 && simd_level() == SimdLevel::avx512vnni;
}

/// Whether a division takes no longer than the two multiplications that refine
/// an estimate of the reciprocal: so on AMD's processors with AVX-512, while
/// Intel's need 16 cycles for a vector.
bool divides_fast();

/// The level's name, for people.
const char* simd_level_name(SimdLevel level);

} // namespace kdci

// Declares the table `name` of every level and a function `name()` that
// returns the one to use.
#if defined(KDCI_SIMD_X86)
#define KDCI_DECLARE_PER_LEVEL(Table, name) \
  namespace baseline {                      \
  extern const Table name;                  \
  }                                         \
  namespace avx2 {                          \
  extern const Table name;                  \
  }                                         \
  namespace avx512 {                        \
  extern const Table name;                  \
  }                                         \
  namespace avx512vnni {                    \
  extern const Table name;                  \
  }                                         \
  static inline const Table& name() {       \
    switch (simd_level()) {                 \
      case SimdLevel::avx512vnni:           \
        return avx512vnni::name;            \
      case SimdLevel::avx512:               \
        return avx512::name;                \
      case SimdLevel::avx2:                 \
        return avx2::name;                  \
      default:                              \
        return baseline::name;              \
    }                                       \
  }
#else
#define KDCI_DECLARE_PER_LEVEL(Table, name) \
  namespace baseline {                      \
  extern const Table name;                  \
  }                                         \
  static inline const Table& name() {       \
    return baseline::name;                  \
  }
#endif

// The same for a class template: tables of float and double, and `name<T>()`.
#define KDCI_DECLARE_PER_TYPE(Table, name)             \
  KDCI_DECLARE_PER_LEVEL(Table<float>, name##_float)   \
  KDCI_DECLARE_PER_LEVEL(Table<double>, name##_double) \
  template <typename T>                                \
  const Table<T>& name();                              \
  template <>                                          \
  inline const Table<float>& name<float>() {           \
    return name##_float();                             \
  }                                                    \
  template <>                                          \
  inline const Table<double>& name<double>() {         \
    return name##_double();                            \
  }
