#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi,bmi2")
#endif

#define HJEPA_ISA avx512bf16
#define HJEPA_BF16
#define HJEPA_VECTOR_BYTES 64
#include "kernels.h"

namespace hjepa_fast {

extern const Kernels<float> avx512bf16_float;
const Kernels<float> avx512bf16_float = avx512bf16::table<avx512bf16::Bf16>;

}  // namespace hjepa_fast

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
