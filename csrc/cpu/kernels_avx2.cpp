#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif

#define HJEPA_ISA avx2
#define HJEPA_VECTOR_BYTES 32
#include "kernels.h"

namespace hjepa_fast {

extern const Kernels<float> avx2_float;
extern const Kernels<double> avx2_double;
const Kernels<float> avx2_float = avx2::table<avx2::Plain<float>>;
const Kernels<double> avx2_double = avx2::table<avx2::Plain<double>>;

}  // namespace hjepa_fast

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
