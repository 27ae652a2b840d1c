// Products of a few rows with packed weights, and sums of outer products.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// Accumulators are MR x 2 vectors: as many rows as the registers hold beside two vectors of B and one broadcast.
constexpr int MAX_MR = HJEPA_VECTOR_BYTES == 64 ? 12 : 6;

// How products are formed. Numbers of x and B are taken in units along the inner dimension: single ones, or pairs of
// bfloat16 in the space of one float.
template <class T>
struct Plain {
  using Scalar = T;
  using Unit = T;
  static constexpr i64 DEPTH = 1;
  static HJEPA_INLINE void add_product(Vec<T>& acc, Unit x, Vec<T> b) { acc += x * b; }
  // units of LANES columns, of which n are there
  static HJEPA_INLINE Vec<T> pair(const T* W, i64, i64, i64 n) { return load_first(W, n); }
  // LANES units of a row of which `left` numbers are left
  static HJEPA_INLINE Vec<T> along(const T* W, i64 left) { return load_first(W, left); }
  static const Unit* rows(const T* X, i64, i64, i64, T*) { return X; }
};

#ifdef HJEPA_BF16
struct Bf16 {
  using Scalar = float;
  using Unit = float;  // two bfloat16
  static constexpr i64 DEPTH = 2;
  static HJEPA_INLINE void add_product(Vec<float>& acc, Unit x, Vec<float> b) {
    acc = bits<Vec<float>>(_mm512_dpbf16_ps(bits<__m512>(acc), bits<__m512bh>(splat_bits(x)), bits<__m512bh>(b)));
  }
  static HJEPA_INLINE __m512i splat_bits(Unit x) { return _mm512_set1_epi32(bits<int>(x)); }
  static HJEPA_INLINE Vec<float> pair(const float* W, i64 left, i64 ldW, i64 n) {
    const __m256i even = bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(load_first(W, n))));
    const __m256i odd = bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(left > 1 ? load_first(W + ldW, n) : Vec<float>{})));
    const __m512i wide = _mm512_cvtepu16_epi32(odd);
    return bits<Vec<float>>(_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(wide, 16)));
  }
  static HJEPA_INLINE Vec<float> along(const float* W, i64 left) {
    const __m512 x0 = bits<__m512>(load_first(W, left)), x1 = bits<__m512>(load_first(W + 16, left - 16));
    return bits<Vec<float>>(_mm512_cvtne2ps_pbh(x1, x0));
  }
  // The rows X [n, inner], padded with zeros to a whole number of pairs.
  static const Unit* rows(const float* X, i64 n, i64 inner, i64 ldx, float* converted) {
    for (i64 r = 0; r < n; ++r)
      for (i64 k = 0; k < inner; k += 32) store(converted + r * ldx + k / 2, along(X + r * ldx + k, inner - k));
    return converted;
  }
};
#endif

template <class P>
i64 packed_size(i64 inner, i64 columns) {
  using T = typename P::Scalar;
  return n_panels<T>(columns) * ((inner + P::DEPTH - 1) / P::DEPTH) * NR<T>;
}

// rows[j][k] <-> rows[k][j]: blocks of half the size change places, then blocks within these.
template <class T>
HJEPA_INLINE void transpose(Vec<T>* rows) {
  IntVec<T> lane;
  for (int i = 0; i < LANES<T>; ++i) lane[i] = i;
#pragma GCC unroll 8
  for (int s = LANES<T> / 2; s; s /= 2) {
    const IntVec<T> in_low = (lane & s) == 0;
    const IntVec<T> low = in_low ? lane : lane - s + LANES<T>, high = in_low ? lane + s : lane + LANES<T>;
#pragma GCC unroll 16
    for (int i = 0; i < LANES<T>; ++i) {
      if (i & s) continue;
      const Vec<T> x = rows[i], y = rows[i + s];
      rows[i] = shuffle(x, y, low);
      rows[i + s] = shuffle(x, y, high);
    }
  }
}

template <class P, class T>
void pack(const T* W, i64 ldW, bool transposed, i64 inner, i64 columns, T* packed, i64 first, i64 last) {
  const i64 units = (inner + P::DEPTH - 1) / P::DEPTH;
  for (i64 panel = first; panel < last; ++panel) {
    T* to = packed + panel * units * NR<T>;
    for (i64 half = 0; half < NR<T>; half += LANES<T>) {
      const i64 column = panel * NR<T> + half, left = columns - column;
      const i64 n = left < 0 ? 0 : left < LANES<T> ? left : LANES<T>;
      if (!transposed) {
        for (i64 k = 0; k < units; ++k)
          store(to + k * NR<T> + half, P::pair(W + P::DEPTH * k * ldW + column, inner - P::DEPTH * k, ldW, n));
        continue;
      }
      for (i64 k0 = 0; k0 < units; k0 += LANES<T>) {
        Vec<T> rows[LANES<T>] = {};
        for (i64 j = 0; j < n; ++j) rows[j] = P::along(W + (column + j) * ldW + P::DEPTH * k0, inner - P::DEPTH * k0);
        transpose<T>(rows);
        for (i64 k = 0; k < LANES<T> && k0 + k < units; ++k) store(to + (k0 + k) * NR<T> + half, rows[k]);
      }
    }
  }
}

// Rows that are fetched ahead of their use. Packed weights are larger than a second-level cache, and the processor's own
// prefetching stops at every page: 7 to 10 % off the products of 8 to 48 rows with five matrices in turn.
constexpr i64 AHEAD = 16;

// C [MR, NR] = X [MR, units] B, every number summed in the order of k whatever MR is.
template <class P, int MR>
void product_tile(const typename P::Unit* X, i64 ldx, const typename P::Scalar* B, i64 ldb, i64 units, typename P::Scalar* C,
                  i64 ldc) {
  using T = typename P::Scalar;
  Vec<T> acc[MR][2] = {};
  for (i64 k = 0; k < units; ++k, B += ldb) {
    const Vec<T> b0 = load(B), b1 = load(B + LANES<T>);
    __builtin_prefetch(B + AHEAD * ldb);
    __builtin_prefetch(B + AHEAD * ldb + LANES<T>);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      P::add_product(acc[i][0], X[i * ldx + k], b0);
      P::add_product(acc[i][1], X[i * ldx + k], b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    store(C + i * ldc, acc[i][0]);
    store(C + i * ldc + LANES<T>, acc[i][1]);
  }
}

// The same for PANELS panels, panel_stride numbers apart, at once: C [MR, PANELS NR]. With few rows a panel's sums would wait for
// their last additions.
template <class P, int MR, int PANELS>
void product_tile_wide(const typename P::Unit* X, i64 ldx, const typename P::Scalar* B, i64 panel_stride, i64 units,
                       typename P::Scalar* C) {
  using T = typename P::Scalar;
  constexpr int N = 2 * PANELS;
  Vec<T> acc[MR][N] = {};
  for (i64 k = 0; k < units; ++k, B += NR<T>)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const T* at = B + j / 2 * panel_stride + j % 2 * LANES<T>;
      const Vec<T> b = load(at);
      __builtin_prefetch(at + AHEAD * NR<T>);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) P::add_product(acc[i][j], X[i * ldx + k], b);
    }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(C + (i * N + j) * LANES<T>, acc[i][j]);
}

// C [MR, NR] += L^T R, for columns of L [n, *] and R [n, *]. C comes last: a long sum loses less if its parts are formed apart.
template <class T, int MR>
void outer_tile(const T* L, i64 ldl, const T* R, i64 ldr, i64 n, T* C, i64 ldc) {
  Vec<T> acc[MR][2] = {};
  for (i64 k = 0; k < n; ++k, L += ldl, R += ldr) {
    const Vec<T> r0 = load(R), r1 = load(R + LANES<T>);
    __builtin_prefetch(L + 8 * ldl);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      acc[i][0] += L[i] * r0;
      acc[i][1] += L[i] * r1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    store(C + i * ldc, load(C + i * ldc) + acc[i][0]);
    store(C + i * ldc + LANES<T>, load(C + i * ldc + LANES<T>) + acc[i][1]);
  }
}

template <class F>
HJEPA_INLINE void with_rows(i64 mr, F f) {
  switch (mr) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
  }
  if constexpr (MAX_MR > 6) switch (mr) {
      case 7: return f.template operator()<7>();
      case 8: return f.template operator()<8>();
      case 9: return f.template operator()<9>();
      case 10: return f.template operator()<10>();
      case 11: return f.template operator()<11>();
      case 12: return f.template operator()<12>();
    }
}

// Calls f.operator()<MR>(row) for even shares of the rows, each as large as the registers allow.
template <class F>
HJEPA_INLINE void over_rows(i64 rows, F f) {
  const i64 shares = (rows + MAX_MR - 1) / MAX_MR;
  for (i64 i = 0; i < shares; ++i) {
    const i64 row = rows * i / shares;
    with_rows(rows * (i + 1) / shares - row, [&]<int MR>() { f.template operator()<MR>(row); });
  }
}

// C [MR, PANELS NR] = X [MR, inner] M, M as it lies: [inner, columns], of which `left` from here on are there. What is beyond a row's
// end is that of the next row, and cleared in the result; the last row has no next.
template <class T, int MR, int PANELS>
void product_tile_as_is(const T* X, i64 ldx, const T* M, i64 ldm, i64 inner, i64 left, T* C) {
  constexpr int N = 2 * PANELS;
  Vec<T> acc[MR][N] = {};
  const bool whole = left >= N * LANES<T>;
  const i64 safe = whole ? inner : ldm >= N * LANES<T> ? inner - 1 : 0;
  const T* row = M;
  for (i64 k = 0; k < safe; ++k, row += ldm) {
    Vec<T> b[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) b[j] = load(row + j * LANES<T>);
    if constexpr (PANELS == 1) {
      __builtin_prefetch(row + AHEAD * ldm);
      __builtin_prefetch(row + AHEAD * ldm + LANES<T>);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] += X[i * ldx + k] * b[j];
  }
  for (i64 k = safe; k < inner; ++k, row += ldm)
    for (int j = 0; j < N; ++j) {
      const i64 n = left - j * LANES<T>;
      const Vec<T> b = n > 0 ? load_first(row + j * LANES<T>, n) : Vec<T>{};
      for (int i = 0; i < MR; ++i) acc[i][j] += X[i * ldx + k] * b;
    }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) store(C + (i * N + j) * LANES<T>, acc[i][j]);
    for (i64 c = left; c < N * LANES<T>; ++c) C[i * N * LANES<T> + c] = 0;
  }
}

constexpr i64 WIDE_ROWS = HJEPA_VECTOR_BYTES == 64 ? 4 : 2, WIDE_PANELS = HJEPA_VECTOR_BYTES == 64 ? 3 : 2;
// of packed operands
constexpr i64 PACKED_WIDE_ROWS = HJEPA_VECTOR_BYTES == 64 ? 3 : 1, PACKED_WIDE_PANELS = 4;

// The sums of eight vectors, one after the other at C. Two vectors are folded into one, each into half of it, so that most additions
// are of whole vectors.
template <class T>
HJEPA_INLINE void put_sums(Vec<T>* v, T* C) {
  if constexpr (LANES<T> < 8) {
    for (int i = 0; i < 8; ++i) C[i] = sum<T>(v[i]);
    return;
  }
  IntVec<T> lane;
  for (int i = 0; i < LANES<T>; ++i) lane[i] = i;
#pragma GCC unroll 3
  for (int n = 4, half = LANES<T> / 2; n; n /= 2, half /= 2) {
    // of each pair of blocks of `half` lanes, in x and then in y, the first
    const IntVec<T> low = lane / half * 2 * half + (lane & (half - 1));
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) v[i] = shuffle(v[2 * i], v[2 * i + 1], low) + shuffle(v[2 * i], v[2 * i + 1], low + half);
  }
  if constexpr (LANES<T> == 16) v[0] = shuffle(v[0], v[0], 2 * lane & 15) + shuffle(v[0], v[0], (2 * lane & 15) + 1);
  __builtin_memcpy(C, v, 8 * sizeof(T));
}

// x . rows of M, `n` <= NR of them: a panel of x M^T with M as it lies.
template <class T>
void product_row_transposed(const T* x, const T* M, i64 ldm, i64 inner, i64 n, T* C) {
  constexpr int GROUP = 8;
  const i64 whole = inner / LANES<T> * LANES<T>;
  for (i64 j = 0; j < n; j += GROUP) {
    if (n - j < GROUP) {
      for (; j < n; ++j) C[j] = dot(M + j * ldm, x, inner);
      break;
    }
    Vec<T> acc[GROUP];
    const Vec<T> rest = load_first(x + whole, inner - whole);
#pragma GCC unroll 8
    for (int g = 0; g < GROUP; ++g) acc[g] = load_first(M + (j + g) * ldm + whole, inner - whole) * rest;
    for (i64 k = 0; k < whole; k += LANES<T>) {
      const Vec<T> xk = load(x + k);
#pragma GCC unroll 8
      for (int g = 0; g < GROUP; ++g) acc[g] += load(M + (j + g) * ldm + k) * xk;
    }
    put_sums<T>(acc, C + j);
  }
  for (; n < NR<T>; ++n) C[n] = 0;
}

// This thread's columns of X [rows, inner] M: epilogue(x, row, column) gets NR numbers of a row at a time, in the nearest cache;
// where they go is its business. `converted` is scratch like X.
template <class P, class T, class Epilogue>
HJEPA_INLINE void product(const Crew& crew, const T* X, i64 ldx, i64 rows, i64 inner, const Right<T>& M, i64 columns,
                          T* converted, Epilogue epilogue) {
  alignas(HJEPA_VECTOR_BYTES) T block[MAX_MR * NR<T>];
  const i64 panels = n_panels<T>(columns);
  if (!M.packed) {
    for (i64 panel = crew.first(panels); panel < crew.last(panels); ++panel) {
      const i64 column = panel * NR<T>, left = columns - column;
      if (M.transposed) {
        for (i64 r = 0; r < rows; ++r) {
          product_row_transposed(X + r * ldx, M.raw + column * M.ld, M.ld, inner, left < NR<T> ? left : NR<T>, block);
          epilogue(block, r, column);
        }
      } else if (rows <= WIDE_ROWS && crew.last(panels) - panel >= WIDE_PANELS) {
        // with few rows, more columns at a time: else every sum waits for its last addition
        alignas(HJEPA_VECTOR_BYTES) T wide[WIDE_ROWS * WIDE_PANELS * NR<T>];
        with_rows(rows, [&]<int MR>() {
          if constexpr (MR <= WIDE_ROWS) {
            product_tile_as_is<T, MR, WIDE_PANELS>(X, ldx, M.raw + column, M.ld, inner, left, wide);
            for (i64 i = 0; i < MR; ++i)
              for (i64 j = 0; j < WIDE_PANELS; ++j) epilogue(wide + (i * WIDE_PANELS + j) * NR<T>, i, column + j * NR<T>);
          }
        });
        panel += WIDE_PANELS - 1;
      } else {
        over_rows(rows, [&]<int MR>(i64 row) {
          product_tile_as_is<T, MR, 1>(X + row * ldx, ldx, M.raw + column, M.ld, inner, left, block);
          for (i64 i = 0; i < MR; ++i) epilogue(block + i * NR<T>, row + i, column);
        });
      }
    }
    return;
  }
  const i64 units = (inner + P::DEPTH - 1) / P::DEPTH;
  const auto* x = P::rows(X, rows, inner, ldx, converted);
  i64 panel = crew.first(panels);
  if (rows <= PACKED_WIDE_ROWS) {
    alignas(HJEPA_VECTOR_BYTES) T wide[PACKED_WIDE_ROWS * PACKED_WIDE_PANELS * NR<T>];
    with_rows(rows, [&]<int MR>() {
      if constexpr (MR <= PACKED_WIDE_ROWS) {
        const auto some = [&]<int PANELS>() {
          for (; panel + PANELS <= crew.last(panels); panel += PANELS) {
            product_tile_wide<P, MR, PANELS>(x, ldx, M.packed + panel * M.ld * NR<T>, M.ld * NR<T>, units, wide);
            for (i64 i = 0; i < MR; ++i)
              for (i64 j = 0; j < PANELS; ++j) epilogue(wide + (i * PANELS + j) * NR<T>, i, (panel + j) * NR<T>);
          }
        };
        some.template operator()<PACKED_WIDE_PANELS>();
        some.template operator()<2>();
      }
    });
  }
  for (; panel < crew.last(panels); ++panel)
    over_rows(rows, [&]<int MR>(i64 row) {
      product_tile<P, MR>(x + row * ldx, ldx, M.packed + panel * M.ld * NR<T>, NR<T>, units, block, NR<T>);
      for (i64 i = 0; i < MR; ++i) epilogue(block + i * NR<T>, row + i, panel * NR<T>);
    });
}

template <class T>
void multiply(const T* X, i64 first, i64 rows, i64 inner, const Operand<T>& B, i64 column, i64 last, const Target<T>& y) {
  T block[MAX_MR * NR<T>];
  for (; column < last; column += NR<T>) {
    const i64 n = last - column < NR<T> ? last - column : NR<T>;
    over_rows(rows, [&]<int MR>(i64 r) {
      product_tile<Plain<T>, MR>(X + (first + r) * inner, inner, B.at + column / NR<T> * B.panel_stride, B.row_stride, inner,
                                 block, NR<T>);
      for (i64 i = 0; i < MR; ++i) {
        const i64 row = first + r + i, group = row / y.group;
        T* to = y.to + group * y.group_stride + row % y.group * y.row_stride + column;
        const T *x = block + i * NR<T>, *base = y.base ? y.base + group * y.base_stride + column : nullptr;
        for (i64 j = 0; j < n; ++j) to[j] = base ? base[j] + x[j] : x[j];
      }
    });
  }
}

// This thread's columns of C [m, columns] += L^T R, L [n, m], R [n, columns]; rows of R and C are padded to whole panels.
template <class T>
void add_outer(const Crew& crew, const T* L, i64 ldl, i64 m, const T* R, i64 ldr, i64 columns, i64 n, T* C, i64 ldc) {
  const i64 panels = n_panels<T>(columns);
  for (i64 column = crew.first(panels) * NR<T>; column < crew.last(panels) * NR<T>; column += NR<T>)
    over_rows(m, [&]<int MR>(i64 row) { outer_tile<T, MR>(L + row, ldl, R + column, ldr, n, C + row * ldc + column, ldc); });
}

}  // namespace hjepa_fast::HJEPA_ISA
