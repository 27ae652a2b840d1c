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

// Coefficients of a sub-step, see hjepa_fast/schemes.py.
template <class T>
struct SubStep {
  T kick, drift, implicit_kick, implicit_drift;
  bool implicit;

  SubStep(const Problem<T>& p, int i)
      : kick(T(p.scheme[4 * i])), drift(T(p.scheme[4 * i + 1])), implicit_kick(T(p.scheme[4 * i + 2])),
        implicit_drift(T(p.scheme[4 * i + 3])), implicit(implicit_kick != 0 || implicit_drift != 0) {}
};

template <class P>
struct ForwardTile {
  using T = typename P::Scalar;
  Evaluation<P> at;
  T *step, *sq, *sp, *moved;
  // of implicit sub-steps: a where one starts; where the gradient at y takes it; how far that was in the last few steps,
  // for each sub-step the last one first
  T *base, *target, *history;
  FixedPoint<T> point;
  i64 rows;

  ForwardTile(const Problem<T>& p, i64 rows, Pieces<T>& pieces)
      : at(p, rows, pieces), point(p.implicit ? rows : 0, p.width[0], ld<T>(p.width[0]), pieces), rows(rows) {
    const i64 all = rows * ld<T>(p.width[0]);
    for (T** x : {&step, &sq, &sp, &moved}) *x = pieces.take(all);
    for (T** x : {&base, &target}) *x = pieces.take(p.implicit ? all : 0);
    history = pieces.take(p.implicit ? p.n_sub * EXTRAPOLATION * all : 0);
  }

  // to += c x for the product x
  HJEPA_INLINE auto add_to(T* to, T c) const {
    const i64 w = ld<T>(at.p.width[0]);
    return [=](T* x, i64 r, i64 column) {
      T* y = to + r * w + column;
      for (i64 j = 0; j < NR<T>; j += LANES<T>) store(y + j, load(y + j) + c * load(x + j));
    };
  }

  void add_product(bool kick, T c, T* to, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = ld<T>(h);
    if (kick)
      product<P>(step, w, R, h, p.KT_packed, h, moved, w, at.converted, add_to(to, -c));
    else
      product<P>(step, w, R, h, p.K_packed, h, moved, w, at.converted, add_to(to, c));
  }

  void set_step(i64 row, i64 R, i64 t) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = ld<T>(h);
    for (i64 r = 0; r < R; ++r) {
      const T dt = p.dt[(row + r) * p.dt_stride + t];
      for (i64 c = r * w; c < r * w + h; c += LANES<T>) store(step + c, dt * load(at.e[0] + c));
    }
  }

  // The point of an implicit sub-step into a[0], delta there and `step`; a where the sub-step starts into `base`.
  void find_point(const SubStep<T>& s, int i, i64 row, i64 R, i64 t) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = ld<T>(h), all = rows * w;
    T *a = at.a[0], *last = history + i * EXTRAPOLATION * all;
    const int known = t - p.begin < EXTRAPOLATION ? int(t - p.begin) : EXTRAPOLATION;
    // a ring: what was found k steps ago
    const auto ago = [&](i64 k) { return last + (t - k) % EXTRAPOLATION * all; };
    for (i64 c = 0; c < R * w; c += LANES<T>) {
      const Vec<T> start = load(a + c);
      store(base + c, start);
      Vec<T> guess = start;
      for (int k = 0; k < known; ++k) guess += T(extrapolation(known, k)) * load(ago(k + 1) + c);
      store(a + c, guess);
    }
    point.solve(a, target, R, T(1), p.tolerance, p.max_evaluations, [&] {
      at.run(R, nullptr, 0);
      set_step(row, R, t);
      __builtin_memcpy(target, base, R * w * sizeof(T));
      if (s.implicit_kick) add_product(true, s.implicit_kick, target, R);
      if (s.implicit_drift) add_product(false, s.implicit_drift, target, R);
    });
    for (i64 c = 0; c < R * w; c += LANES<T>) store(ago(0) + c, load(target + c) - load(base + c));
    for (i64 r = 0; r < R; ++r) {
      T& residual = p.residual[(row + r) * p.n_steps + t];
      if (!(point.residual[r] <= residual)) residual = point.residual[r];
      p.evaluations[(row + r) * p.n_steps + t] += std::int32_t(point.evaluations[r]);
    }
  }

  // a <- base moved by the sub-step; what its point was moved by already is not multiplied again.
  void move_from_base(const SubStep<T>& s, i64 R) {
    const i64 w = ld<T>(at.p.width[0]);
    T kick = s.kick, drift = s.drift, share = 0;
    if (s.implicit_kick && s.implicit_drift) {
      if (s.kick * s.implicit_drift == s.drift * s.implicit_kick) share = s.kick / s.implicit_kick, kick = drift = 0;
    } else if (s.implicit_kick) {
      share = s.kick / s.implicit_kick, kick = 0;
    } else {
      share = s.drift / s.implicit_drift, drift = 0;
    }
    for (i64 c = 0; c < R * w; c += LANES<T>)
      store(at.a[0] + c, load(base + c) + share * (load(target + c) - load(base + c)));
    if (kick) add_product(true, kick, at.a[0], R);
    if (drift) add_product(false, drift, at.a[0], R);
  }

  void run(i64 row, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = ld<T>(h), state = p.n_kept * h, first = p.n_kept > 1 ? (p.begin - 1) * h : 0;
    T* a = at.a[0];
    if (p.implicit) clear(base, R * w), clear(target, R * w);
    copy_rows(a, w, p.a + row * h, h, R, h);
    clear(sq, R * w);
    clear(sp, R * w);
    if (p.begin) {
      copy_rows(sq, w, p.sq + row * state + first, state, R, h);
      copy_rows(sp, w, p.sp + row * state + first, state, R, h);
    }
    for (i64 t = p.begin; t < p.end; ++t) {
      if (p.implicit)
        for (i64 r = 0; r < R; ++r) p.residual[(row + r) * p.n_steps + t] = 0, p.evaluations[(row + r) * p.n_steps + t] = 0;
      for (int i = 0; i < p.n_sub; ++i) {
        const SubStep<T> s(p, i);
        if (s.implicit) {
          find_point(s, i, row, R, t);
        } else {
          at.run(R, i == 0 && p.energy ? p.energy + row * p.n_steps + t : nullptr, p.n_steps);
          set_step(row, R, t);
        }
        if (p.tape_width)
          at.save(p.tape + ((row * p.n_steps + t) * p.n_sub + i) * p.tape_width, p.n_steps * p.n_sub * p.tape_width, R);
        for (i64 c = 0; c < R * w; c += LANES<T>) {
          if (s.kick) store(sp + c, load(sp + c) - s.kick * load(step + c));
          if (s.drift) store(sq + c, load(sq + c) + s.drift * load(step + c));
        }
        if (s.implicit) {
          move_from_base(s, R);
        } else {
          if (s.kick) add_product(true, s.kick, a, R);
          if (s.drift) add_product(false, s.drift, a, R);
        }
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
  T *w_0, *target, *nu_N;  // of implicit sub-steps: w; w + c nu N^T; nu N^T
  FixedPoint<T> cotangent;

  BackwardTile(const Problem<T>& p, i64 rows, Pieces<T>& pieces, const Sums<T>* sums)
      : at(p, rows, pieces), sums(sums), capacity(sums && rows < GATHER ? GATHER / rows : 1),
        cotangent(p.implicit ? rows : 0, p.width[0], ld<T>(p.width[0]), pieces) {
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
    const i64 most = sums ? capacity * (p.implicit ? 4 : 2) * rows * w : 0;
    leftK = pieces.take(most);
    rightK = pieces.take(most);
    for (T** x : {&w_0, &target, &nu_N}) *x = pieces.take(p.implicit ? rows * w : 0);
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

  // nu = gradient of v . delta(a) + gE F(a), where `at` holds a_l and g_l; left in curve[0]
  void adjoint(const T* gE, i64 strideE, i64 R, const Sums<T>* sums) {
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
  }

  // v <- the solution of v = w + c nu(v) N^T, where v is w at first
  void solve_cotangent(const SubStep<T>& s, i64 row, i64 R, i64 t) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0];
    __builtin_memcpy(w_0, v, R * w * sizeof(T));
    const auto add = [&](T c) {
      return [=, this](T* x, i64 r, i64 column) {
        T* to = nu_N + r * w + column;
        for (i64 j = 0; j < NR<T>; j += LANES<T>) store(to + j, load(to + j) + c * load(x + j));
      };
    };
    constexpr T tiny = sizeof(T) == 4 ? T(1.1754944e-38) : T(2.2250738585072014e-308);
    cotangent.solve(v, target, R, tiny, p.tolerance, p.max_evaluations, [&] {
      adjoint(nullptr, 0, R, nullptr);
      clear(nu_N, R * w);
      if (s.implicit_kick) product<P>(curve[0], w, R, h, p.K_packed, h, ad, w, at.converted, add(-s.implicit_kick));
      if (s.implicit_drift) product<P>(curve[0], w, R, h, p.KT_packed, h, ad, w, at.converted, add(s.implicit_drift));
      for (i64 r = 0; r < R; ++r) {
        const T dt = p.dt[(row + r) * p.dt_stride + t];
        for (i64 c = r * w; c < r * w + h; c += LANES<T>) store(target + c, load(w_0 + c) + dt * load(nu_N + c));
      }
    });
    for (i64 r = 0; r < R; ++r) {
      if (!(cotangent.residual[r] <= p.residual[row + r])) p.residual[row + r] = cotangent.residual[r];
      p.gdt[(row + r) * p.n_steps + t] += dot(nu_N + r * w, at.e[0] + r * w, h);
    }
  }

  void run(i64 row, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0], state = p.n_kept * h, padded = round_up(h, LANES<T>);
    for (T* x : {la, lsq, lsp, u, v, curve[0]}) clear(x, R * w);
    if (p.implicit) clear(target, R * w);
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
        const SubStep<T> s(p, i);
        const T kick = s.kick, drift = s.drift;
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
        if (s.implicit) solve_cotangent(s, row, R, t);
        adjoint(i == 0 && p.gE ? p.gE + row * p.n_steps + t : nullptr, p.n_steps, R, sums);
        const T* nu = curve[0];
        if (sums && s.implicit_kick) gather_K(nu, step, -s.implicit_kick, R);
        if (sums && s.implicit_drift) gather_K(step, nu, s.implicit_drift, R);
        for (i64 c = 0; c < R * w; c += LANES<T>) store(la + c, load(la + c) + load(nu + c));
        if (sums && ++used == capacity) flush(R);
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
