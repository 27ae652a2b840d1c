// The loop for many rows: a tile of rows runs the whole rollout by itself, with products of all its rows at a time.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

template <class T>
HJEPA_INLINE void copy_rows(T* to, i64 ld_to, const T* from, i64 ld_from, i64 rows, i64 n) {
  for (i64 r = 0; r < rows; ++r) __builtin_memcpy(to + r * ld_to, from + r * ld_from, n * sizeof(T));
}

template <class T>
HJEPA_INLINE void clear(T* x, i64 n) {
  __builtin_memset(x, 0, n * sizeof(T));
}

// A tile's evaluation of delta: layer values with leading dimension ld(width), so that padding needs no care.
template <class P>
struct Evaluation {
  using T = typename P::Scalar;
  const Problem<T>& p;
  i64 rows;
  T *a[MAX_LAYERS], *g[MAX_LAYERS];  // a_l; g_l (g[L-1] is not stored: it is w for every row)
  T *e[MAX_LAYERS], *d[MAX_LAYERS];  // z_l, overwritten by e_l; s'(a_l)
  T* converted;
  i64 lds[MAX_LAYERS];

  Evaluation(const Problem<T>& p, i64 rows, Pieces<T>& pieces) : p(p), rows(rows) {
    i64 widest = 0;
    for (int l = 0; l < p.L; ++l) {
      lds[l] = ld<T>(p.width[l]);
      widest = lds[l] > widest ? lds[l] : widest;
      a[l] = pieces.take(rows * lds[l]);
      g[l] = pieces.take(l + 1 < p.L ? rows * lds[l] : 0);
      e[l] = pieces.take(rows * lds[l]);
      d[l] = pieces.take(rows * lds[l]);
    }
    converted = pieces.take(P::DEPTH > 1 ? rows * widest : 0);
    if (pieces.base) clear(a[0], rows * lds[0]);  // its padding is never written
  }

  // From a[0] the other a, g, and e[0] = delta; H [rows, strided] too if it is not null.
  void run(i64 R, T* H, i64 strideH) {
    const int L = p.L;
    for (i64 r = 0; r < R; ++r)
      activate<T>(p.activation, a[0] + r * lds[0], e[0] + r * lds[0], d[0] + r * lds[0], round_up(p.width[0], LANES<T>));
    for (int l = 0; l + 1 < L; ++l) {
      const i64 to = lds[l + 1];
      product<P>(e[l], lds[l], R, p.width[l], p.WT_packed[l], p.width[l + 1], a[l + 1], to, converted,
                 [&](T* x, i64 r, i64 column) {
                   for (i64 i = 0; i < NR<T>; i += LANES<T>) store(x + i, load(x + i) + load(p.b[l] + column + i));
                   activate<T>(p.activation, x, e[l + 1] + r * to + column, d[l + 1] + r * to + column, NR<T>);
                 });
    }
    const T* w = p.W[L - 1];
    for (i64 r = 0; r < R; ++r) {
      T *z = e[L - 1] + r * lds[L - 1], *slope = d[L - 1] + r * lds[L - 1];
      if (H) H[r * strideH] = dot(z, w, p.width[L - 1]) + p.b[L - 1][0];
      for (i64 i = 0; i < p.width[L - 1]; i += LANES<T>) store(z + i, load(w + i) * load(slope + i));
    }
    for (int l = L - 2; l >= 0; --l)
      product<P>(e[l + 1], lds[l + 1], R, p.width[l + 1], p.W_packed[l], p.width[l], g[l], lds[l], converted,
                 [&](T* x, i64 r, i64 column) {
                   T *to = e[l] + r * lds[l] + column, *slope = d[l] + r * lds[l] + column;
                   for (i64 i = 0; i < NR<T>; i += LANES<T>) store(to + i, load(x + i) * load(slope + i));
                 });
  }

  void save(T* tape, i64 stride, i64 R) const {
    i64 at = 0;
    for (int l = 0; l < (p.tape_layers ? p.L : 1); at += p.width[l++])
      copy_rows(tape + at, stride, a[l], lds[l], R, p.width[l]);
    for (int l = 0; p.tape_layers && l + 1 < p.L; at += p.width[l++])
      copy_rows(tape + at, stride, g[l], lds[l], R, p.width[l]);
  }

  void restore(const T* tape, i64 stride, i64 R) {
    i64 at = 0;
    for (int l = 0; l < (p.tape_layers ? p.L : 1); at += p.width[l++])
      copy_rows(a[l], lds[l], tape + at, stride, R, p.width[l]);
    for (int l = 0; p.tape_layers && l + 1 < p.L; at += p.width[l++])
      copy_rows(g[l], lds[l], tape + at, stride, R, p.width[l]);
    if (!p.tape_layers) run(R, nullptr, 0);
  }
};

template <class P>
struct ForwardTile {
  using T = typename P::Scalar;
  Evaluation<P> at;
  T *step, *sq, *sp, *moved;

  ForwardTile(const Problem<T>& p, i64 rows, Pieces<T>& pieces) : at(p, rows, pieces) {
    for (T** x : {&step, &sq, &sp, &moved}) *x = pieces.take(rows * ld<T>(p.width[0]));
  }

  void run(i64 row, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = ld<T>(h), state = p.n_kept * h, first = p.n_kept > 1 ? (p.begin - 1) * h : 0;
    T* a = at.a[0];
    copy_rows(a, w, p.a + row * h, h, R, h);
    clear(sq, R * w);
    clear(sp, R * w);
    if (p.begin) {
      copy_rows(sq, w, p.sq + row * state + first, state, R, h);
      copy_rows(sp, w, p.sp + row * state + first, state, R, h);
    }
    for (i64 t = p.begin; t < p.end; ++t) {
      for (int i = 0; i < p.n_sub; ++i) {
        const T kick = T(p.scheme[2 * i]), drift = T(p.scheme[2 * i + 1]);
        at.run(R, i == 0 && p.energy ? p.energy + row * p.n_steps + t : nullptr, p.n_steps);
        if (p.tape_width)
          at.save(p.tape + ((row * p.n_steps + t) * p.n_sub + i) * p.tape_width, p.n_steps * p.n_sub * p.tape_width, R);
        for (i64 r = 0; r < R; ++r) {
          const T dt = p.dt[(row + r) * p.dt_stride + t];
          for (i64 c = r * w; c < r * w + h; c += LANES<T>) {
            const Vec<T> s = dt * load(at.e[0] + c);
            store(step + c, s);
            if (kick) store(sp + c, load(sp + c) - kick * s);
            if (drift) store(sq + c, load(sq + c) + drift * s);
          }
        }
        const auto move_by = [&](T c) {
          return [=, this](T* x, i64 r, i64 column) {
            T* to = at.a[0] + r * ld<T>(at.p.width[0]) + column;
            for (i64 j = 0; j < NR<T>; j += LANES<T>) store(to + j, load(to + j) + c * load(x + j));
          };
        };
        if (kick) product<P>(step, w, R, h, p.KT_packed, h, moved, w, at.converted, move_by(-kick));
        if (drift) product<P>(step, w, R, h, p.K_packed, h, moved, w, at.converted, move_by(drift));
      }
      if (p.n_kept > 1 || t + 1 == p.end) {
        const i64 to = row * state + (p.n_kept > 1 ? t * h : 0);
        copy_rows(p.sq + to, state, sq, w, R, h);
        copy_rows(p.sp + to, state, sp, w, R, h);
      }
    }
    copy_rows(p.a + row * h, h, a, w, R, h);
  }
};

// The adjoint. Factors of the weights' gradients are gathered over several sub-steps and multiplied together, since
// adding to a matrix costs as much as a few dozen rows' products.
template <class P>
struct BackwardTile {
  using T = typename P::Scalar;
  static constexpr i64 GATHER = 96;
  Evaluation<P> at;
  const Sums<T>* sums;
  i64 capacity, used = 0;            // sub-steps gathered
  T *left[MAX_LAYERS], *right[MAX_LAYERS];  // (e_{l+1}, r_{l+1}) and (zd_l, z_l), 2 rows for each sub-step and sample
  T *leftK, *rightK;
  i64 rowsK = 0;
  T *la, *lsq, *lsp, *u, *v, *r_1, *d[MAX_LAYERS], *curve[MAX_LAYERS], *ad;

  BackwardTile(const Problem<T>& p, i64 rows, Pieces<T>& pieces, const Sums<T>* sums)
      : at(p, rows, pieces), sums(sums), capacity(sums && rows < GATHER ? GATHER / rows : 1) {
    const i64 w = ld<T>(p.width[0]);
    i64 widest = 0;
    for (T** x : {&la, &lsq, &lsp, &u, &v, &r_1}) *x = pieces.take(rows * w);
    for (int l = 0; l < p.L; ++l) {
      widest = at.lds[l] > widest ? at.lds[l] : widest;
      d[l] = pieces.take(rows * at.lds[l]);
      curve[l] = pieces.take(rows * at.lds[l]);
      left[l] = pieces.take(l + 1 < p.L ? capacity * 2 * rows * at.lds[l + 1] : 0);
      right[l] = pieces.take(capacity * 2 * rows * at.lds[l]);
    }
    ad = pieces.take(rows * widest);
    leftK = pieces.take(sums ? capacity * 2 * rows * w : 0);
    rightK = pieces.take(sums ? capacity * 2 * rows * w : 0);
  }

  void flush(i64 R) {
    const Problem<T>& p = at.p;
    if (!sums) return;
    add_outer(leftK, at.lds[0], p.width[0], rightK, at.lds[0], p.width[0], rowsK, sums->K, at.lds[0]);
    for (int l = 0; l + 1 < p.L; ++l)
      add_outer(left[l], at.lds[l + 1], p.width[l + 1], right[l], at.lds[l], p.width[l], used * 2 * R, sums->W[l], at.lds[l]);
    used = rowsK = 0;
  }

  // left^T (scale right), of R rows each, goes to the gradient of K
  void gather_K(const T* x, const T* y, T scale, i64 R) {
    const i64 n = R * at.lds[0];
    T *to_left = leftK + rowsK * at.lds[0], *to_right = rightK + rowsK * at.lds[0];
    for (i64 c = 0; c < n; c += LANES<T>) store(to_left + c, load(x + c)), store(to_right + c, scale * load(y + c));
    rowsK += R;
  }

  // la += gradient of v . delta(a) + gE F(a), where `at` holds a_l and g_l
  void add_adjoint(const T* gE, i64 strideE, i64 R) {
    const Problem<T>& p = at.p;
    const int last = p.L - 1;
    T *zd[MAX_LAYERS], *z[MAX_LAYERS];
    for (int l = 0; l < p.L; ++l) {
      zd[l] = right[l] + used * 2 * R * at.lds[l];
      z[l] = zd[l] + R * at.lds[l];
    }
    for (i64 r = 0; r < R; ++r) {
      const i64 c = r * at.lds[0];
      const i64 n = round_up(p.width[0], LANES<T>);
      activate<T>(p.activation, at.a[0] + c, v + c, z[0] + c, d[0] + c, zd[0] + c, curve[0] + c, n);
    }
    for (int l = 0; l < last; ++l)
      product<P>(zd[l], at.lds[l], R, p.width[l], p.WT_packed[l], p.width[l + 1], ad, at.lds[l + 1], at.converted,
                 [&](T* x, i64 r, i64 column) {
                   const i64 c = r * at.lds[l + 1] + column;
                   activate<T>(p.activation, at.a[l + 1] + c, x, z[l + 1] + c, d[l + 1] + c, zd[l + 1] + c,
                               curve[l + 1] + c, NR<T>);
                 });
    // r_L replaces the curvature there; with one hidden layer it is the result
    const T* w = p.W[last];
    for (i64 r = 0; r < R; ++r) {
      const T gH = gE ? gE[r * strideE] : T(0);
      for (i64 i = 0; i < p.width[last]; i += LANES<T>) {
        const i64 c = r * at.lds[last] + i;
        Vec<T> x = load(w + i) * load(curve[last] + c);
        if (gE) x += gH * load(w + i) * load(d[last] + c);
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
      const i64 from = at.lds[l + 1];
      T* r_next = curve[l + 1];
      if (sums) {
        T *e = left[l] + used * 2 * R * from, *r_row = e + R * from;
        for (i64 r = 0; r < R; ++r)
          for (i64 i = 0; i < p.width[l + 1]; i += LANES<T>) {
            const i64 c = r * from + i;
            store(e + c, load(l + 1 < last ? at.g[l + 1] + c : w + i) * load(d[l + 1] + c));
            store(r_row + c, load(r_next + c));
            store(sums->b[l] + i, load(sums->b[l] + i) + load(r_next + c));
          }
      }
      product<P>(r_next, from, R, p.width[l + 1], p.W_packed[l], p.width[l], ad, at.lds[l], at.converted,
                 [&](T* x, i64 r, i64 column) {
                   for (i64 i = 0; i < NR<T>; i += LANES<T>) {
                     const i64 c = r * at.lds[l] + column + i;
                     store(curve[l] + c, load(x + i) * load(d[l] + c) + load(at.g[l] + c) * load(curve[l] + c));
                   }
                 });
    }
    for (i64 c = 0; c < R * at.lds[0]; c += LANES<T>) store(la + c, load(la + c) + load(curve[0] + c));
    used += 1;
  }

  void run(i64 row, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0], state = p.n_kept * h, padded = round_up(h, LANES<T>);
    for (T* x : {la, lsq, lsp, u, v, curve[0]}) clear(x, R * w);
    copy_rows(la, w, p.la + row * h, h, R, h);
    copy_rows(lsq, w, p.lsq + row * h, h, R, h);
    copy_rows(lsp, w, p.lsp + row * h, h, R, h);
    for (i64 t = p.end - 1; t >= p.begin; --t) {
      if (p.n_kept == p.n_steps || t == p.n_steps - 1)
        for (i64 r = 0; r < R; ++r) {
          const i64 from = (row + r) * state + (p.n_kept > 1 ? t * h : 0);
          for (i64 c = 0; c < h; ++c) lsq[r * w + c] += p.gsq[from + c], lsp[r * w + c] += p.gsp[from + c];
        }
      for (i64 r = 0; r < R; ++r) p.gdt[(row + r) * p.n_steps + t] = 0;
      for (int i = p.n_sub - 1; i >= 0; --i) {
        const T kick = T(p.scheme[2 * i]), drift = T(p.scheme[2 * i + 1]);
        at.restore(p.tape + ((row * p.n_steps + t) * p.n_sub + i) * p.tape_width, p.n_steps * p.n_sub * p.tape_width, R);
        const auto add_to_u = [&](T c, const T* l) {
          return [=, this](T* x, i64 r, i64 column) {
            const i64 to = r * w + column;
            for (i64 j = 0; j < NR<T>; j += LANES<T>)
              store(u + to + j, load(u + to + j) + c * (load(l + to + j) + load(x + j)));
          };
        };
        clear(u, R * w);
        if (kick) product<P>(la, w, R, h, p.K_packed, h, r_1, w, at.converted, add_to_u(-kick, lsp));
        if (drift) product<P>(la, w, R, h, p.KT_packed, h, r_1, w, at.converted, add_to_u(drift, lsq));
        T* step = r_1;
        for (i64 r = 0; r < R; ++r) {
          T* delta = at.e[0] + r * w;
          if (p.tape_layers) {
            activate<T>(p.activation, at.a[0] + r * w, step + r * w, d[0] + r * w, padded);
            for (i64 c = 0; c < h; c += LANES<T>)
              store(delta + c, load(p.L > 1 ? at.g[0] + r * w + c : p.W[0] + c) * load(d[0] + r * w + c));
          }
          const T dt = p.dt[(row + r) * p.dt_stride + t];
          p.gdt[(row + r) * p.n_steps + t] += dot(u + r * w, delta, h);
          for (i64 c = r * w; c < r * w + h; c += LANES<T>) {
            store(v + c, dt * load(u + c));
            store(step + c, dt * load(delta + c - r * w));
          }
        }
        if (sums && kick) gather_K(la, step, -kick, R);
        if (sums && drift) gather_K(step, la, drift, R);
        add_adjoint(i == 0 && p.gE ? p.gE + row * p.n_steps + t : nullptr, p.n_steps, R);
        if (used == capacity) flush(R);
        if (!sums) used = 0;
      }
    }
    if (used) flush(R);
    copy_rows(p.la + row * h, h, la, w, R, h);
    copy_rows(p.lsq + row * h, h, lsq, w, R, h);
    copy_rows(p.lsp + row * h, h, lsp, w, R, h);
  }
};

template <class P, class T>
i64 forward_scratch(const Problem<T>& p, i64 rows) {
  Pieces<T> pieces{nullptr};
  ForwardTile<P> tile(p, rows, pieces);
  return pieces.used;
}

template <class P, class T>
void forward(const Problem<T>& p, i64 row, i64 rows, T* scratch) {
  Pieces<T> pieces{scratch};
  ForwardTile<P>(p, rows, pieces).run(row, rows);
}

template <class P, class T>
i64 backward_scratch(const Problem<T>& p, i64 rows, bool with_sums) {
  Pieces<T> pieces{nullptr};
  const Sums<T> any{};
  BackwardTile<P> tile(p, rows, pieces, with_sums ? &any : nullptr);
  return pieces.used;
}

template <class P, class T>
void backward(const Problem<T>& p, i64 row, i64 last, i64 rows, T* scratch, const Sums<T>* sums) {
  const i64 tiles = (last - row + rows - 1) / rows, n = last - row;
  for (i64 i = 0; i < tiles; ++i) {
    const i64 from = row + n * i / tiles, to = row + n * (i + 1) / tiles;
    Pieces<T> pieces{scratch};
    BackwardTile<P>(p, rows, pieces, sums).run(from, to - from);
  }
}

}  // namespace hjepa_fast::HJEPA_ISA
