// Vectors by the compilers' own vector types: the same source for every instruction set, HJEPA_VECTOR_BYTES wide.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

#define HJEPA_INLINE inline __attribute__((always_inline))

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(HJEPA_VECTOR_BYTES)));
  typedef std::int32_t integers __attribute__((vector_size(HJEPA_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(HJEPA_VECTOR_BYTES)));
  typedef std::int64_t integers __attribute__((vector_size(HJEPA_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using IntVec = typename VectorOf<T>::integers;

template <class T>
constexpr int LANES = HJEPA_VECTOR_BYTES / sizeof(T);

template <class T>
HJEPA_INLINE Vec<T> load(const T* x) {
  Vec<T> v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

template <class T>
HJEPA_INLINE void store(T* x, Vec<T> v) {
  __builtin_memcpy(x, &v, sizeof v);
}

template <class To, class From>
HJEPA_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// The first n numbers at x, or all there is room for, then zeros.
template <class T>
HJEPA_INLINE Vec<T> load_first(const T* x, i64 n) {
  if (n >= LANES<T>) return load(x);
  if (n <= 0) return Vec<T>{};
#if HJEPA_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return bits<Vec<T>>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), x));
  else
    return bits<Vec<T>>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), x));
#elif HJEPA_VECTOR_BYTES == 32
  IntVec<T> lane;
  for (int i = 0; i < LANES<T>; ++i) lane[i] = i;
  const __m256i mask = bits<__m256i>(lane < decltype(lane[0])(n));
  if constexpr (sizeof(T) == 4)
    return bits<Vec<T>>(_mm256_maskload_ps(x, mask));
  else
    return bits<Vec<T>>(_mm256_maskload_pd(x, mask));
#else
  Vec<T> v = {};
  for (i64 i = 0; i < n; ++i) v[i] = x[i];
  return v;
#endif
}

// Lane i of the result is lane from[i] of x followed by y.
template <class V, class I>
HJEPA_INLINE V shuffle(V x, V y, I from) {
#if defined(__clang__)
  V z;
  constexpr int n = sizeof(V) / sizeof(x[0]);
  for (int i = 0; i < n; ++i) z[i] = from[i] < n ? x[from[i]] : y[from[i] - n];
  return z;
#else
  return __builtin_shuffle(x, y, from);
#endif
}

template <class T>
HJEPA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// In halves, so that the order of additions is fixed and short.
template <class T>
HJEPA_INLINE T sum(Vec<T> v) {
  IntVec<T> lane;
  for (int i = 0; i < LANES<T>; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int n = LANES<T> / 2; n; n /= 2) v += shuffle(v, v, (lane + n) & (LANES<T> - 1));
  return v[0];
}

template <class T>
HJEPA_INLINE T dot(const T* x, const T* y, i64 n) {
  Vec<T> v = {};
  i64 i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) v += load(x + i) * load(y + i);
  T s = sum<T>(v);
  for (; i < n; ++i) s += x[i] * y[i];
  return s;
}

HJEPA_INLINE i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Numbers of a panel: columns are taken two vectors at a time.
template <class T>
constexpr i64 NR = 2 * LANES<T>;

// Leading dimension of scratch for rows of n numbers: whole panels, so that nothing needs a remainder, and not a power
// of two, so that rows do not compete for the same lines of the cache.
template <class T>
i64 ld(i64 n) {
  return round_up(n, NR<T>) + 64 / i64(sizeof(T));
}

template <class T>
i64 n_panels(i64 columns) {
  return (columns + NR<T> - 1) / NR<T>;
}

// Hands out pieces of a buffer; with a null buffer only counts, so that one constructor both sizes and lays out scratch.
template <class T>
struct Pieces {
  T* base;
  i64 used = 0;
  T* take(i64 n) {
    T* piece = base ? base + used : nullptr;
    used += round_up(n, 64 / sizeof(T));
    if (base) HJEPA_FORBID(base + used);
    used += FORBIDDEN / sizeof(T);
    return piece;
  }
};

}  // namespace hjepa_fast::HJEPA_ISA
