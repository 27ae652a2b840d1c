// The loop for many rows: a tile of rows goes through the whole rollout, with products of all its rows at a time. A thread
// has a tile to itself, or where there are too few rows for that a crew of threads shares one and divides its columns.
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

// The same for a thread's columns of rows of n numbers, which end where the caller's rows do.
template <class T>
HJEPA_INLINE void copy_own(const Crew& crew, T* to, i64 ld_to, const T* from, i64 ld_from, i64 rows, i64 n) {
  const i64 panels = n_panels<T>(n), first = crew.first(panels) * NR<T>, last = crew.last(panels) * NR<T>;
  if (first < n) copy_rows(to + first, ld_to, from + first, ld_from, rows, (last < n ? last : n) - first);
}

// A panel's numbers of a row, as far as the row goes: to[column], ..., where a row has n numbers.
template <class T>
HJEPA_INLINE void put(T* to, const T* x, i64 column, i64 n) {
  if (n - column >= NR<T>) {
    store(to + column, load(x));
    store(to + column + LANES<T>, load(x + LANES<T>));
  } else {
    for (i64 i = 0; column + i < n; ++i) to[column + i] = x[i];
  }
}

// Sums over the columns of each row, panel by panel, so that it does not matter who adds up which panel.
template <class T>
struct RowSums {
  T* at = nullptr;
  i64 stride = 0;

  RowSums() = default;
  RowSums(i64 rows, i64 widest, Pieces<T>& pieces) : at(pieces.take(rows * n_panels<T>(widest))), stride(n_panels<T>(widest)) {}
  HJEPA_INLINE void set(i64 r, i64 column, Vec<T> terms) { at[r * stride + column / NR<T>] = sum<T>(terms); }
  HJEPA_INLINE T total(i64 r, i64 columns) const {
    double s = 0;
    for (i64 panel = 0; panel < n_panels<T>(columns); ++panel) s += at[r * stride + panel];
    return T(s);
  }
};

// Where an evaluation leaves a_l and g_l, if anybody wants them: rows of any stride.
template <class T>
struct Layers {
  T *a[MAX_LAYERS] = {}, *g[MAX_LAYERS] = {};
  i64 stride[MAX_LAYERS] = {};

  // The first rows' place on the tape.
  static Layers on(T* tape, const Problem<T>& p) {
    Layers to;
    i64 at = 0;
    for (int l = 0; l < (p.tape_layers ? p.L : p.tape_width > 0); at += p.width[l++]) to.a[l] = tape + at;
    for (int l = 0; p.tape_layers && l + 1 < p.L; at += p.width[l++]) to.g[l] = tape + at;
    for (int l = 0; l < p.L; ++l) to.stride[l] = p.n_steps * p.n_sub * p.tape_width;
    return to;
  }
};

// A tile's evaluation of delta: layer values with leading dimension ld(width), so that padding needs no care.
template <class P>
struct Evaluation {
  using T = typename P::Scalar;
  const Problem<T>& p;
  const Crew& crew;
  T* a;                              // [rows, ld(h)]
  T *e[MAX_LAYERS], *d[MAX_LAYERS];  // z_l, overwritten by e_l; s'(a_l)
  RowSums<T> sums;
  T* converted;  // this thread's
  i64 lds[MAX_LAYERS], widest = 0;

  Evaluation(const Problem<T>& p, const Crew& crew, i64 rows, Pieces<T>& pieces) : p(p), crew(crew) {
    for (int l = 0; l < p.L; ++l) {
      lds[l] = ld<T>(p.width[l]);
      widest = lds[l] > widest ? lds[l] : widest;
      e[l] = pieces.take(rows * lds[l]);
      d[l] = pieces.take(rows * lds[l]);
    }
    a = pieces.take(rows * lds[0]);
    sums = RowSums<T>(rows, widest, pieces);
    converted = pieces.take(P::DEPTH > 1 ? crew.all * rows * widest : 0) + crew.thread * rows * widest;
  }

  // e[0] = delta in the crew's own columns, where `a` is complete in them; H [rows, strided] too if it is not null.
  void run(i64 R, T* H, i64 strideH, const Layers<T>& keep) {
    const int last = p.L - 1;
    // with one layer nobody has met since the others read what this overwrites
    if (last == 0) crew.meet();
    crew.template over_panels<T>(R, p.width[0], [&](i64 r, i64 column) { enter(0, a + r * lds[0] + column, r, column, H, keep); });
    for (int l = 0; l < last; ++l) {
      crew.meet();
      product<P>(crew, e[l], lds[l], R, p.width[l], p.WT_packed[l], p.width[l + 1], converted, [&](T* x, i64 r, i64 column) {
        for (i64 i = 0; i < NR<T>; i += LANES<T>) store(x + i, load(x + i) + load(p.b[l] + column + i));
        enter(l + 1, x, r, column, H, keep);
      });
    }
    for (int l = last - 1; l >= 0; --l) {
      crew.meet();
      product<P>(crew, e[l + 1], lds[l + 1], R, p.width[l + 1], p.W_packed[l], p.width[l], converted,
                 [&](T* x, i64 r, i64 column) {
                   if (keep.g[l]) put(keep.g[l] + r * keep.stride[l], x, column, p.width[l]);
                   T *to = e[l] + r * lds[l] + column, *slope = d[l] + r * lds[l] + column;
                   for (i64 i = 0; i < NR<T>; i += LANES<T>) store(to + i, load(x + i) * load(slope + i));
                 });
    }
    if (!H) return;
    if (last == 0) crew.meet();
    for (i64 r = crew.first(R); r < crew.last(R); ++r) H[r * strideH] = sums.total(r, p.width[last]) + p.b[last][0];
  }

 private:
  // A panel x of a_l gives z_l and s', or at the last layer e_L = w s'.
  HJEPA_INLINE void enter(int l, const T* x, i64 r, i64 column, const T* H, const Layers<T>& keep) {
    if (keep.a[l]) put(keep.a[l] + r * keep.stride[l], x, column, p.width[l]);
    T *z = e[l] + r * lds[l] + column, *slope = d[l] + r * lds[l] + column;
    activate<T>(p.activation, x, z, slope, NR<T>);
    if (l + 1 < p.L) return;
    const T* w = p.W[l] + column;
    Vec<T> energy = {};
    for (i64 i = 0; i < NR<T>; i += LANES<T>) {
      energy += load(z + i) * load(w + i);
      store(z + i, load(w + i) * load(slope + i));
    }
    if (H) sums.set(r, column, energy);
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
  Crew& crew;
  Evaluation<P> at;
  T *step, *sq, *sp;
  // of implicit sub-steps: a where one starts; where the gradient at y takes it; how far that was in the last few steps,
  // for each sub-step the last one first
  T *base, *target, *history;
  FixedPoint<T> point;
  i64 rows;

  ForwardTile(const Problem<T>& p, Crew& crew, i64 rows, Pieces<T>& pieces)
      : crew(crew), at(p, crew, rows, pieces), point(p.implicit ? rows : 0, p.width[0], ld<T>(p.width[0]), pieces), rows(rows) {
    const i64 all = rows * ld<T>(p.width[0]);
    for (T** x : {&step, &sq, &sp}) *x = pieces.take(all);
    for (T** x : {&base, &target}) *x = pieces.take(p.implicit ? all : 0);
    history = pieces.take(p.implicit ? p.n_sub * EXTRAPOLATION * all : 0);
  }

  // to += c step K, or with K^T for a kick
  void add_product(bool kick, T c, T* to, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0];
    if (kick) c = -c;
    product<P>(crew, step, w, R, h, kick ? p.KT_packed : p.K_packed, h, at.converted, [=](T* x, i64 r, i64 column) {
      T* y = to + r * w + column;
      for (i64 j = 0; j < NR<T>; j += LANES<T>) store(y + j, load(y + j) + c * load(x + j));
    });
  }

  // step = dt delta, in the crew's own columns
  void set_step(i64 row, i64 R, i64 t) {
    const Problem<T>& p = at.p;
    const i64 w = at.lds[0];
    crew.template over_own<T>(R, p.width[0], [&](i64 r, i64 c) {
      store(step + r * w + c, p.dt[(row + r) * p.dt_stride + t] * load(at.e[0] + r * w + c));
    });
  }

  // The point of an implicit sub-step into a, delta there and `step`; a where the sub-step starts into `base`.
  void find_point(const SubStep<T>& s, int i, i64 row, i64 R, i64 t, const Layers<T>& keep) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0], all = rows * w;
    T *a = at.a, *last = history + i * EXTRAPOLATION * all;
    const int known = t - p.begin < EXTRAPOLATION ? int(t - p.begin) : EXTRAPOLATION;
    // a ring: what was found k steps ago
    const auto ago = [&](i64 k) { return last + (t - k) % EXTRAPOLATION * all; };
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) {
      const i64 j = r * w + c;
      const Vec<T> start = load(a + j);
      store(base + j, start);
      Vec<T> guess = start;
      for (int k = 0; k < known; ++k) guess += T(extrapolation(known, k)) * load(ago(k + 1) + j);
      store(a + j, guess);
    });
    point.solve(crew, a, target, R, T(1), p.tolerance, p.max_evaluations, [&] {
      at.run(R, nullptr, 0, keep);
      set_step(row, R, t);
      crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(target + r * w + c, load(base + r * w + c)); });
      crew.meet();
      if (s.implicit_kick) add_product(true, s.implicit_kick, target, R);
      if (s.implicit_drift) add_product(false, s.implicit_drift, target, R);
    });
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) {
      store(ago(0) + r * w + c, load(target + r * w + c) - load(base + r * w + c));
    });
    for (i64 r = crew.first(R); r < crew.last(R); ++r) {
      T& residual = p.residual[(row + r) * p.n_steps + t];
      if (!(point.residual[r] <= residual)) residual = point.residual[r];
      p.evaluations[(row + r) * p.n_steps + t] += std::int32_t(point.evaluations[r]);
    }
  }

  // a <- base moved by the sub-step; what its point was moved by already is not multiplied again.
  void move_from_base(const SubStep<T>& s, i64 R) {
    const i64 w = at.lds[0];
    T kick = s.kick, drift = s.drift, share = 0;
    if (s.implicit_kick && s.implicit_drift) {
      if (s.kick * s.implicit_drift == s.drift * s.implicit_kick) share = s.kick / s.implicit_kick, kick = drift = 0;
    } else if (s.implicit_kick) {
      share = s.kick / s.implicit_kick, kick = 0;
    } else {
      share = s.drift / s.implicit_drift, drift = 0;
    }
    crew.template over_own<T>(R, at.p.width[0], [&](i64 r, i64 c) {
      const i64 j = r * w + c;
      store(at.a + j, load(base + j) + share * (load(target + j) - load(base + j)));
    });
    if (kick) add_product(true, kick, at.a, R);
    if (drift) add_product(false, drift, at.a, R);
  }

  void run(i64 row, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0], state = p.n_kept * h, first = p.n_kept > 1 ? (p.begin - 1) * h : 0;
    T* a = at.a;
    if (crew.thread == 0) {
      for (T* x : {a, sq, sp}) clear(x, R * w);
      copy_rows(a, w, p.a + row * h, h, R, h);
      if (p.begin) {
        copy_rows(sq, w, p.sq + row * state + first, state, R, h);
        copy_rows(sp, w, p.sp + row * state + first, state, R, h);
      }
    }
    for (i64 t = p.begin + crew.start(); t < p.end; ++t) {
      if (crew.may_let_in(t - p.begin)) crew.let_in(t - p.begin);
      if (p.implicit)
        for (i64 r = crew.first(R); r < crew.last(R); ++r)
          p.residual[(row + r) * p.n_steps + t] = 0, p.evaluations[(row + r) * p.n_steps + t] = 0;
      for (int i = 0; i < p.n_sub; ++i) {
        const SubStep<T> s(p, i);
        const auto keep = Layers<T>::on(p.tape + ((row * p.n_steps + t) * p.n_sub + i) * p.tape_width, p);
        if (s.implicit) {
          find_point(s, i, row, R, t, keep);
        } else {
          at.run(R, i == 0 && p.energy ? p.energy + row * p.n_steps + t : nullptr, p.n_steps, keep);
          set_step(row, R, t);
        }
        crew.template over_own<T>(R, h, [&](i64 r, i64 c) {
          const i64 j = r * w + c;
          if (s.kick) store(sp + j, load(sp + j) - s.kick * load(step + j));
          if (s.drift) store(sq + j, load(sq + j) + s.drift * load(step + j));
        });
        crew.meet();
        if (s.implicit) {
          move_from_base(s, R);
        } else {
          if (s.kick) add_product(true, s.kick, a, R);
          if (s.drift) add_product(false, s.drift, a, R);
        }
      }
      if (p.n_kept > 1 || t + 1 == p.end) {
        const i64 to = row * state + (p.n_kept > 1 ? t * h : 0);
        copy_own(crew, p.sq + to, state, sq, w, R, h);
        copy_own(crew, p.sp + to, state, sp, w, R, h);
      }
      if (t + 1 == p.end) copy_own(crew, p.a + row * h, h, a, w, R, h);
      if (crew.leaves(t - p.begin)) return;
    }
    crew.end(p.end - p.begin);
  }
};

// The adjoint. Factors of the weights' gradients are gathered over several sub-steps and multiplied together, since
// adding to a matrix costs as much as a few dozen rows' products.
template <class P>
struct BackwardTile {
  using T = typename P::Scalar;
  static constexpr i64 GATHER = 96;
  Crew& crew;
  Evaluation<P> at;
  Layers<T> kept;  // a_l and g_l of the sub-step, copied from the tape or computed again
  const Sums<T>* sums;
  i64 capacity, used = 0;                   // sub-steps gathered
  T *left[MAX_LAYERS], *right[MAX_LAYERS];  // (e_{l+1}, r_{l+1}) and (zd_l, z_l), 2 rows for each sub-step and sample
  T *leftK, *rightK;
  i64 rowsK = 0;
  T *la, *lsq, *lsp, *u, *v, *step, *d[MAX_LAYERS], *curve[MAX_LAYERS];
  T *w_0, *target, *nu_N;  // of implicit sub-steps: w; w + c nu N^T; nu N^T
  FixedPoint<T> cotangent;

  BackwardTile(const Problem<T>& p, Crew& crew, i64 rows, Pieces<T>& pieces, const Sums<T>* sums)
      : crew(crew), at(p, crew, rows, pieces), sums(sums), capacity(sums && rows < GATHER ? GATHER / rows : 1),
        cotangent(p.implicit ? rows : 0, p.width[0], ld<T>(p.width[0]), pieces) {
    const i64 w = at.lds[0];
    for (T** x : {&la, &lsq, &lsp, &u, &v, &step}) *x = pieces.take(rows * w);
    for (int l = 0; l < p.L; ++l) {
      const i64 n = rows * at.lds[l];
      d[l] = pieces.take(n);
      curve[l] = pieces.take(n);
      kept.a[l] = pieces.take(n);
      kept.g[l] = l + 1 < p.L ? pieces.take(n) : nullptr;
      kept.stride[l] = at.lds[l];
      left[l] = pieces.take(l + 1 < p.L ? capacity * 2 * rows * at.lds[l + 1] : 0);
      right[l] = pieces.take(capacity * 2 * n);
    }
    const i64 most = sums ? capacity * (p.implicit ? 4 : 2) * rows * w : 0;
    leftK = pieces.take(most);
    rightK = pieces.take(most);
    for (T** x : {&w_0, &target, &nu_N}) *x = pieces.take(p.implicit ? rows * w : 0);
  }

  // a_l, g_l and delta at a sub-step, in the crew's own columns.
  void restore(const T* tape, i64 R) {
    const Problem<T>& p = at.p;
    const auto saved = Layers<T>::on(const_cast<T*>(tape), p);
    for (int l = 0; l < p.L; ++l) {
      if (saved.a[l]) copy_own(crew, kept.a[l], kept.stride[l], saved.a[l], saved.stride[l], R, p.width[l]);
      if (saved.g[l]) copy_own(crew, kept.g[l], kept.stride[l], saved.g[l], saved.stride[l], R, p.width[l]);
    }
    if (p.tape_layers) return;
    copy_own(crew, at.a, at.lds[0], kept.a[0], at.lds[0], R, p.width[0]);
    Layers<T> rest = kept;
    rest.a[0] = nullptr;
    at.run(R, nullptr, 0, rest);
  }

  void flush(i64 R) {
    const Problem<T>& p = at.p;
    if (!used) return;
    crew.meet();
    add_outer(crew, leftK, at.lds[0], p.width[0], rightK, at.lds[0], p.width[0], rowsK, sums->K, at.lds[0]);
    for (int l = 0; l + 1 < p.L; ++l)
      add_outer(crew, left[l], at.lds[l + 1], p.width[l + 1], right[l], at.lds[l], p.width[l], used * 2 * R, sums->W[l],
                at.lds[l]);
    crew.meet();
    used = rowsK = 0;
  }

  // left^T (scale right), of R rows each, goes to the gradient of K
  void gather_K(const T* x, const T* y, T scale, i64 R) {
    const i64 w = at.lds[0];
    T *to_left = leftK + rowsK * w, *to_right = rightK + rowsK * w;
    crew.template over_own<T>(R, at.p.width[0], [&](i64 r, i64 c) {
      const i64 j = r * w + c;
      store(to_left + j, load(x + j));
      store(to_right + j, scale * load(y + j));
    });
    rowsK += R;
  }

  // The place of z_l and zd_l, [R, ld] each, in what is gathered.
  T* zd(int l, i64 R) const { return right[l] + used * 2 * R * at.lds[l]; }
  T* z(int l, i64 R) const { return zd(l, R) + R * at.lds[l]; }

  // The first layer of the adjoint: z_1, s', their tangents along v
  void enter(i64 R) {
    const i64 w = at.lds[0];
    crew.template over_panels<T>(R, at.p.width[0], [&](i64 r, i64 column) {
      const i64 c = r * w + column;
      activate<T>(at.p.activation, kept.a[0] + c, v + c, z(0, R) + c, d[0] + c, zd(0, R) + c, curve[0] + c, NR<T>);
    });
  }

  // nu = gradient of v . delta(a) + gE F(a), where `kept` holds a_l and g_l; after `enter`. Left in curve[0].
  void adjoint(const T* gE, i64 strideE, i64 R, const Sums<T>* sums) {
    const Problem<T>& p = at.p;
    const int last = p.L - 1;
    for (int l = 0; l < last; ++l) {
      crew.meet();
      product<P>(crew, zd(l, R), at.lds[l], R, p.width[l], p.WT_packed[l], p.width[l + 1], at.converted,
                 [&](T* x, i64 r, i64 column) {
                   const i64 c = r * at.lds[l + 1] + column;
                   activate<T>(p.activation, kept.a[l + 1] + c, x, z(l + 1, R) + c, d[l + 1] + c, zd(l + 1, R) + c,
                               curve[l + 1] + c, NR<T>);
                 });
    }
    // r_L replaces the curvature there; with one hidden layer it is the result. Sums over rows are formed before they are added
    // to those of other sub-steps: one number after the other would lose a digit.
    const T* w = p.W[last];
    const T *z_last = z(last, R), *zd_last = zd(last, R);
    crew.template over_columns<T>(p.width[last], [&](i64 i) {
      Vec<T> dw = {};
      for (i64 r = 0; r < R; ++r) {
        const i64 c = r * at.lds[last] + i;
        Vec<T> x = load(w + i) * load(curve[last] + c);
        dw += load(zd_last + c);
        if (gE) {
          x += gE[r * strideE] * load(w + i) * load(d[last] + c);
          dw += gE[r * strideE] * load(z_last + c);
        }
        store(curve[last] + c, x);
      }
      if (sums) store(sums->W[last] + i, load(sums->W[last] + i) + dw);
    });
    if (sums && gE && crew.thread == 0) {
      T db = 0;
      for (i64 r = 0; r < R; ++r) db += gE[r * strideE];
      sums->b[last][0] += db;
    }
    for (int l = last - 1; l >= 0; --l) {
      const i64 from = at.lds[l + 1];
      T* r_next = curve[l + 1];
      if (sums) {
        T *e = left[l] + used * 2 * R * from, *r_row = e + R * from;
        crew.template over_columns<T>(p.width[l + 1], [&](i64 i) {
          Vec<T> db = {};
          for (i64 r = 0; r < R; ++r) {
            const i64 c = r * from + i;
            store(e + c, load(l + 1 < last ? kept.g[l + 1] + c : w + i) * load(d[l + 1] + c));
            store(r_row + c, load(r_next + c));
            db += load(r_next + c);
          }
          store(sums->b[l] + i, load(sums->b[l] + i) + db);
        });
      }
      crew.meet();
      product<P>(crew, r_next, from, R, p.width[l + 1], p.W_packed[l], p.width[l], at.converted, [&](T* x, i64 r, i64 column) {
        for (i64 i = 0; i < NR<T>; i += LANES<T>) {
          const i64 c = r * at.lds[l] + column + i;
          store(curve[l] + c, load(x + i) * load(d[l] + c) + load(kept.g[l] + c) * load(curve[l] + c));
        }
      });
    }
  }

  // v <- the solution of v = w + c nu(v) N^T, where v is w at first
  void solve_cotangent(const SubStep<T>& s, i64 row, i64 R, i64 t) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0];
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(w_0 + r * w + c, load(v + r * w + c)); });
    const auto add = [&](const T* packed, T c) {
      product<P>(crew, curve[0], w, R, h, packed, h, at.converted, [=, this](T* x, i64 r, i64 column) {
        T* to = nu_N + r * w + column;
        for (i64 j = 0; j < NR<T>; j += LANES<T>) store(to + j, load(to + j) + c * load(x + j));
      });
    };
    constexpr T tiny = sizeof(T) == 4 ? T(1.1754944e-38) : T(2.2250738585072014e-308);
    cotangent.solve(crew, v, target, R, tiny, p.tolerance, p.max_evaluations, [&] {
      enter(R);
      adjoint(nullptr, 0, R, nullptr);
      crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(nu_N + r * w + c, Vec<T>{}); });
      crew.meet();
      if (s.implicit_kick) add(p.K_packed, -s.implicit_kick);
      if (s.implicit_drift) add(p.KT_packed, s.implicit_drift);
      crew.template over_own<T>(R, h, [&](i64 r, i64 c) {
        const i64 j = r * w + c;
        store(target + j, load(w_0 + j) + p.dt[(row + r) * p.dt_stride + t] * load(nu_N + j));
      });
    });
    for (i64 r = crew.first(R); r < crew.last(R); ++r) {
      if (!(cotangent.residual[r] <= p.residual[row + r])) p.residual[row + r] = cotangent.residual[r];
      // delta = step / dt, which dt = 0 would have lost
      p.gdt[(row + r) * p.n_steps + t] += dot(nu_N + r * w, at.e[0] + r * w, h);
    }
  }

  void run(i64 row, i64 R) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0], state = p.n_kept * h;
    if (crew.thread == 0) {
      for (T* x : {la, lsq, lsp}) clear(x, R * w);
      // what is read beyond a row's end must be finite
      for (int l = 0; l < p.L; ++l) {
        clear(kept.a[l], R * at.lds[l]);
        if (kept.g[l]) clear(kept.g[l], R * at.lds[l]);
      }
      clear(at.a, R * w);
      copy_rows(la, w, p.la + row * h, h, R, h);
      copy_rows(lsq, w, p.lsq + row * h, h, R, h);
      copy_rows(lsp, w, p.lsp + row * h, h, R, h);
    }
    const i64 n = p.end - p.begin;
    for (i64 done = crew.start(); done < n; ++done) {
      if (crew.may_let_in(done)) {
        flush(R);
        crew.let_in(done);
      }
      const i64 t = p.end - 1 - done;
      if (p.n_kept == p.n_steps || t == p.n_steps - 1) {
        const i64 from = row * state + (p.n_kept > 1 ? t * h : 0);
        add_own(lsq, p.gsq + from, state, R);
        add_own(lsp, p.gsp + from, state, R);
      }
      for (i64 r = crew.first(R); r < crew.last(R); ++r) p.gdt[(row + r) * p.n_steps + t] = 0;
      for (int i = p.n_sub - 1; i >= 0; --i) sub_step(i, row, R, t);
      if (done + 1 == n) {
        flush(R);
        copy_own(crew, p.la + row * h, h, la, w, R, h);
        copy_own(crew, p.lsq + row * h, h, lsq, w, R, h);
        copy_own(crew, p.lsp + row * h, h, lsp, w, R, h);
      }
      if (crew.leaves(done)) return;
    }
    crew.end(n);
  }

 private:
  // to [R, ld] += from [R, strided], the crew's own columns
  void add_own(T* to, const T* from, i64 stride, i64 R) {
    i64 first, last;
    crew.template columns<T>(at.p.width[0], first, last);
    if (last > at.p.width[0]) last = at.p.width[0];
    for (i64 r = 0; r < R; ++r)
      for (i64 c = first; c < last; ++c) to[r * at.lds[0] + c] += from[r * stride + c];
  }

  void sub_step(int i, i64 row, i64 R, i64 t) {
    const Problem<T>& p = at.p;
    const i64 h = p.width[0], w = at.lds[0];
    const SubStep<T> s(p, i);
    restore(p.tape + ((row * p.n_steps + t) * p.n_sub + i) * p.tape_width, R);
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(u + r * w + c, Vec<T>{}); });
    crew.meet();
    const auto add_to_u = [&](const T* packed, T c, const T* l) {
      product<P>(crew, la, w, R, h, packed, h, at.converted, [=, this](T* x, i64 r, i64 column) {
        const i64 to = r * w + column;
        for (i64 j = 0; j < NR<T>; j += LANES<T>)
          store(u + to + j, load(u + to + j) + c * (load(l + to + j) + load(x + j)));
      });
    };
    if (s.kick) add_to_u(p.K_packed, -s.kick, lsp);
    if (s.drift) add_to_u(p.KT_packed, s.drift, lsq);
    crew.template over_panels<T>(R, h, [&](i64 r, i64 column) {
      const i64 c = r * w + column;
      const T dt = p.dt[(row + r) * p.dt_stride + t];
      T* delta = at.e[0] + c;
      if (p.tape_layers) {
        // z and s' are worked out once more in `enter`: with the products of a layer around it that is little
        activate<T>(p.activation, kept.a[0] + c, step + c, d[0] + c, NR<T>);
        for (i64 j = 0; j < NR<T>; j += LANES<T>)
          store(delta + j, load(p.L > 1 ? kept.g[0] + c + j : p.W[0] + column + j) * load(d[0] + c + j));
      }
      Vec<T> u_delta = {};
      for (i64 j = 0; j < NR<T>; j += LANES<T>) {
        u_delta += load(u + c + j) * load(delta + j);
        store(v + c + j, dt * load(u + c + j));
        store(step + c + j, dt * load(delta + j));
      }
      at.sums.set(r, column, u_delta);
    });
    if (sums && s.kick) gather_K(la, step, -s.kick, R);
    if (sums && s.drift) gather_K(step, la, s.drift, R);
    crew.meet();
    for (i64 r = crew.first(R); r < crew.last(R); ++r) p.gdt[(row + r) * p.n_steps + t] += at.sums.total(r, h);
    if (s.implicit) solve_cotangent(s, row, R, t);
    enter(R);
    adjoint(i == 0 && p.gE ? p.gE + row * p.n_steps + t : nullptr, p.n_steps, R, sums);
    const T* nu = curve[0];
    if (sums && s.implicit_kick) gather_K(nu, step, -s.implicit_kick, R);
    if (sums && s.implicit_drift) gather_K(step, nu, s.implicit_drift, R);
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(la + r * w + c, load(la + r * w + c) + load(nu + r * w + c)); });
    if (sums && ++used == capacity) flush(R);
  }
};

template <class P, class T>
i64 forward_scratch(const Problem<T>& p, i64 rows, int crew_size) {
  Pieces<T> pieces{nullptr};
  Crew crew{nullptr, 0, crew_size};
  ForwardTile<P> tile(p, crew, rows, pieces);
  return pieces.used;
}

template <class P, class T>
void forward(const Problem<T>& p, i64 row, i64 rows, int thread, int crew_size, Barrier* barrier, T* scratch) {
  Pieces<T> pieces{scratch};
  Crew crew{barrier, thread, crew_size};
  ForwardTile<P>(p, crew, rows, pieces).run(row, rows);
}

template <class P, class T>
i64 backward_scratch(const Problem<T>& p, i64 rows, bool with_sums, int crew_size) {
  Pieces<T> pieces{nullptr};
  const Sums<T> any{};
  Crew crew{nullptr, 0, crew_size};
  BackwardTile<P> tile(p, crew, rows, pieces, with_sums ? &any : nullptr);
  return pieces.used;
}

template <class P, class T>
void backward(const Problem<T>& p, i64 row, i64 last, i64 rows, int thread, int crew_size, Barrier* barrier, T* scratch,
              const Sums<T>* sums) {
  const i64 tiles = (last - row + rows - 1) / rows, n = last - row;
  for (i64 i = 0; i < tiles; ++i) {
    const i64 from = row + n * i / tiles, to = row + n * (i + 1) / tiles;
    Pieces<T> pieces{scratch};
    Crew crew{barrier, thread, crew_size};
    BackwardTile<P>(p, crew, rows, pieces, sums).run(from, to - from);
  }
}

}  // namespace hjepa_fast::HJEPA_ISA
