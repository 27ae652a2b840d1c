// One network for the rows of a tile, by one thread: its gradient delta, and the adjoint of that.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// epilogue(x, row, column) gets X [rows, inner] B, B packed, NR numbers of a row at a time. `converted` is scratch like X.
template <class P, class T, class Epilogue>
HJEPA_INLINE void multiply_rows(const T* X, i64 ldx, i64 rows, i64 inner, const T* B, i64 columns, T* converted,
                                Epilogue epilogue) {
  alignas(HJEPA_VECTOR_BYTES) T block[MAX_MR * NR<T>];
  const i64 units = (inner + P::DEPTH - 1) / P::DEPTH;
  const auto* x = P::rows(X, rows, inner, ldx, converted);
  for (i64 column = 0; column < columns; column += NR<T>, B += units * NR<T>)
    over_rows(rows, [&]<int MR>(i64 row) {
      product_tile<P, MR>(x + row * ldx, ldx, B, NR<T>, units, block, NR<T>);
      for (i64 i = 0; i < MR; ++i) epilogue(block + i * NR<T>, row + i, column);
    });
}

// C [m, columns] += L^T R, L [n, m], R [n, columns]; rows of R and C are padded to whole panels.
template <class T>
void add_products(const T* L, i64 ldl, i64 m, const T* R, i64 ldr, i64 columns, i64 n, T* C, i64 ldc) {
  for (i64 column = 0; column < columns; column += NR<T>)
    over_rows(m, [&]<int MR>(i64 row) { outer_tile<T, MR>(L + row, ldl, R + column, ldr, n, C + row * ldc + column, ldc); });
}

template <class T>
HJEPA_INLINE void copy_block(T* to, i64 ld_to, const T* from, i64 ld_from, i64 rows, i64 n) {
  for (i64 r = 0; r < rows; ++r) __builtin_memcpy(to + r * ld_to, from + r * ld_from, n * sizeof(T));
}

template <class T>
HJEPA_INLINE void set_zero(T* x, i64 n) {
  __builtin_memset(x, 0, n * sizeof(T));
}

// Layer values have leading dimension ld(width), so that padding needs no care.
template <class P>
struct Network {
  using T = typename P::Scalar;
  const Problem<T>& p;
  T *a[MAX_LAYERS], *g[MAX_LAYERS];  // a_l; g_l (g[L-1] is not stored: it is w for every row)
  T *e[MAX_LAYERS], *d[MAX_LAYERS];  // z_l, overwritten by e_l; s'(a_l)
  T* converted;
  i64 h, w, lds[MAX_LAYERS], widest = 0;

  Network(const Problem<T>& p, i64 rows, Pieces<T>& pieces) : p(p), h(p.width[0]), w(ld<T>(h)) {
    for (int l = 0; l < p.L; ++l) {
      lds[l] = ld<T>(p.width[l]);
      widest = lds[l] > widest ? lds[l] : widest;
      for (T** x : {&a[l], &g[l], &e[l], &d[l]}) *x = pieces.take(rows * lds[l]);
    }
    converted = pieces.take(P::DEPTH > 1 ? rows * widest : 0);
    if (pieces.base) set_zero(a[0], rows * w);  // its padding is never written
  }

  // From a[0] the other a, g, and e[0] = delta; H [rows] too if it is not null.
  void run(i64 R, T* H) {
    const int L = p.L;
    for (i64 r = 0; r < R; ++r) activate<T>(p.activation, a[0] + r * w, e[0] + r * w, d[0] + r * w, round_up(h, LANES<T>));
    for (int l = 0; l + 1 < L; ++l)
      multiply_rows<P>(e[l], lds[l], R, p.width[l], p.WT_packed[l], p.width[l + 1], converted, [&](T* x, i64 r, i64 column) {
        const i64 c = r * lds[l + 1] + column;
        for (i64 i = 0; i < NR<T>; i += LANES<T>) store(a[l + 1] + c + i, load(x + i) + load(p.b[l] + column + i));
        activate<T>(p.activation, a[l + 1] + c, e[l + 1] + c, d[l + 1] + c, NR<T>);
      });
    const T* w_out = p.W[L - 1];
    for (i64 r = 0; r < R; ++r) {
      T *z = e[L - 1] + r * lds[L - 1], *slope = d[L - 1] + r * lds[L - 1];
      if (H) H[r] = dot(z, w_out, p.width[L - 1]) + p.b[L - 1][0];
      for (i64 i = 0; i < p.width[L - 1]; i += LANES<T>) store(z + i, load(w_out + i) * load(slope + i));
    }
    for (int l = L - 2; l >= 0; --l)
      multiply_rows<P>(e[l + 1], lds[l + 1], R, p.width[l + 1], p.W_packed[l], p.width[l], converted,
                       [&](T* x, i64 r, i64 column) {
                         const i64 c = r * lds[l] + column;
                         for (i64 i = 0; i < NR<T>; i += LANES<T>) {
                           store(g[l] + c + i, load(x + i));
                           store(e[l] + c + i, load(x + i) * load(d[l] + c + i));
                         }
                       });
  }

  void save(T* tape, i64 stride, i64 R) const {
    on_tape([&](T* layer, i64 ld, i64 at, i64 n) { copy_block(tape + at, stride, layer, ld, R, n); });
  }

  // What `run` leaves that the adjoint needs, e[0] included.
  void restore(const T* tape, i64 stride, i64 R) {
    on_tape([&](T* layer, i64 ld, i64 at, i64 n) { copy_block(layer, ld, tape + at, stride, R, n); });
    if (!p.tape_layers) return run(R, nullptr);
    for (i64 r = 0; r < R; ++r) {
      const i64 c = r * w;
      activate<T>(p.activation, a[0] + c, e[0] + c, d[0] + c, round_up(h, LANES<T>));
      const T* g_1 = p.L > 1 ? g[0] + c : p.W[0];
      for (i64 i = 0; i < h; i += LANES<T>) store(e[0] + c + i, load(g_1 + i) * load(d[0] + c + i));
    }
  }

 private:
  template <class F>
  void on_tape(F f) const {
    i64 at = 0;
    for (int l = 0; l < (p.tape_layers ? p.L : 1); at += p.width[l++]) f(a[l], lds[l], at, p.width[l]);
    for (int l = 0; p.tape_layers && l + 1 < p.L; at += p.width[l++]) f(g[l], lds[l], at, p.width[l]);
  }
};

// Factors of the weights' gradients are gathered over several evaluations and multiplied together, since adding to a matrix
// costs as much as a few dozen rows' products.
template <class P>
struct NetworkAdjoint : Network<P> {
  using T = typename P::Scalar;
  using Network<P>::p, Network<P>::a, Network<P>::g, Network<P>::d, Network<P>::lds, Network<P>::h, Network<P>::w;
  static constexpr i64 GATHER = 96;
  const Sums<T>* sums;
  i64 capacity, used = 0;                   // evaluations gathered
  T *left[MAX_LAYERS], *right[MAX_LAYERS];  // (e_{l+1}, r_{l+1}) and (zd_l, z_l), 2 rows for each evaluation and sample
  T *v, *curve[MAX_LAYERS];

  NetworkAdjoint(const Problem<T>& p, i64 rows, Pieces<T>& pieces, const Sums<T>* sums)
      : Network<P>(p, rows, pieces), sums(sums), capacity(sums && rows < GATHER ? GATHER / rows : 1) {
    v = pieces.take(rows * w);
    for (int l = 0; l < p.L; ++l) {
      curve[l] = pieces.take(rows * lds[l]);
      left[l] = pieces.take(l + 1 < p.L ? capacity * 2 * rows * lds[l + 1] : 0);
      right[l] = pieces.take(capacity * 2 * rows * lds[l]);
    }
    if (pieces.base) set_zero(v, rows * w), set_zero(curve[0], rows * w);
  }

  void flush(i64 R) {
    for (int l = 0; used && l + 1 < p.L; ++l)
      add_products(left[l], lds[l + 1], p.width[l + 1], right[l], lds[l], p.width[l], used * 2 * R, sums->W[l], lds[l]);
    used = 0;
  }

  // The gradient of v . delta(a) + gE F(a) at what was restored, left in curve[0]; that of the parameters to `sums`.
  void run_adjoint(const T* gE, i64 strideE, i64 R) {
    const int last = p.L - 1;
    T *zd[MAX_LAYERS], *z[MAX_LAYERS];
    for (int l = 0; l < p.L; ++l) {
      zd[l] = right[l] + used * 2 * R * lds[l];
      z[l] = zd[l] + R * lds[l];
    }
    for (i64 r = 0; r < R; ++r) {
      const i64 c = r * w;
      activate<T>(p.activation, a[0] + c, v + c, z[0] + c, d[0] + c, zd[0] + c, curve[0] + c, round_up(h, LANES<T>));
    }
    for (int l = 0; l < last; ++l)
      multiply_rows<P>(zd[l], lds[l], R, p.width[l], p.WT_packed[l], p.width[l + 1], this->converted,
                       [&](T* x, i64 r, i64 column) {
                         const i64 c = r * lds[l + 1] + column;
                         activate<T>(p.activation, a[l + 1] + c, x, z[l + 1] + c, d[l + 1] + c, zd[l + 1] + c,
                                     curve[l + 1] + c, NR<T>);
                       });
    // r_L replaces the curvature there; with one hidden layer it is the result
    const T* w_out = p.W[last];
    for (i64 r = 0; r < R; ++r) {
      const T gH = gE ? gE[r * strideE] : T(0);
      for (i64 i = 0; i < p.width[last]; i += LANES<T>) {
        const i64 c = r * lds[last] + i;
        Vec<T> x = load(w_out + i) * load(curve[last] + c);
        if (gE) x += gH * load(w_out + i) * load(d[last] + c);
        if (sums) {
          Vec<T> dw = load(sums->W[last] + i) + load(zd[last] + c);
          if (gE) dw += gH * load(z[last] + c);
          store(sums->W[last] + i, dw);
        }
        store(curve[last] + c, x);
      }
      if (sums && gE) sums->b[last][0] += gH;
    }
    for (int l = last - 1; l >= 0; --l) {
      const i64 from = lds[l + 1];
      const T* r_next = curve[l + 1];
      if (sums) {
        T *e = left[l] + used * 2 * R * from, *r_row = e + R * from;
        for (i64 r = 0; r < R; ++r)
          for (i64 i = 0; i < p.width[l + 1]; i += LANES<T>) {
            const i64 c = r * from + i;
            store(e + c, load(l + 1 < last ? g[l + 1] + c : w_out + i) * load(d[l + 1] + c));
            store(r_row + c, load(r_next + c));
            store(sums->b[l] + i, load(sums->b[l] + i) + load(r_next + c));
          }
      }
      multiply_rows<P>(r_next, from, R, p.width[l + 1], p.W_packed[l], p.width[l], this->converted,
                       [&](T* x, i64 r, i64 column) {
                         for (i64 i = 0; i < NR<T>; i += LANES<T>) {
                           const i64 c = r * lds[l] + column + i;
                           store(curve[l] + c, load(x + i) * load(d[l] + c) + load(g[l] + c) * load(curve[l] + c));
                         }
                       });
    }
    if (sums && ++used == capacity) flush(R);
  }
};

}  // namespace hjepa_fast::HJEPA_ISA
