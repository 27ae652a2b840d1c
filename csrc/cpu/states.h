// Mechanical systems on their states: the equations of hjepa_fast/state_space/equations.py and loop.py for the rows of a tile.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// A network with all its layers, its gradient from a cotangent of its outputs, and the tangent of that. With the hidden values z_l,
// z_0 the features, and e_l the gradient with respect to the l-th pre-activation, e_L that of the outputs, a layer's gradient is
// e_{l+1} z_l^T and its tangent e_{l+1} z'_l^T + r_{l+1} z_l^T: the factors of one sum lie one after the other.
template <class T>
struct DenseTile {
  const Dense<T>& p;
  const Crew& crew;
  i64 R, lds[MAX_LAYERS + 1] = {};
  // (e_l, r_l) and (z'_l, z_l), 2 R rows each; without tangents e_l and z_l
  T *left[MAX_LAYERS + 1] = {}, *right[MAX_LAYERS] = {};
  T *d[MAX_LAYERS] = {}, *curve[MAX_LAYERS] = {}, *g[MAX_LAYERS] = {};  // s'(a_l), s''(a_l), the gradient with respect to z_l
  T* bend[MAX_LAYERS] = {};                                             // g_l s''(a_l) a'_l
  T *y = nullptr, *yd = nullptr;                                        // the outputs and their tangents
  bool tangents;

  // For R of at most `rows` rows, which memory is laid out for.
  DenseTile(const Dense<T>& p, const Crew& crew, i64 rows, i64 R, bool tangents, Pieces<T>& pieces)
      : p(p), crew(crew), R(R), tangents(tangents) {
    if (!p.L) return;
    const i64 twice = tangents ? 2 : 1;
    for (int l = 0; l <= p.L; ++l) {
      lds[l] = ld<T>(p.width[l]);
      const i64 n = rows * lds[l];
      if (l) left[l] = pieces.take(twice * n);
      if (l < p.L) right[l] = pieces.take(twice * n);
      if (!l || l == p.L) continue;
      d[l] = pieces.take(n);
      for (T** x : {&curve[l], &g[l], &bend[l]}) *x = pieces.take(tangents ? n : 0);
    }
    y = pieces.take(rows * lds[p.L]);
    yd = pieces.take(tangents ? rows * lds[p.L] : 0);
  }

  T* e(int l) const { return left[l]; }
  T* r(int l) const { return left[l] + R * lds[l]; }
  T* zd(int l) const { return right[l]; }
  T* z(int l) const { return right[l] + (tangents ? R * lds[l] : 0); }

  template <class Epilogue>
  HJEPA_INLINE void up(const T* x, int l, Epilogue epilogue) const {
    product<Plain<T>>(crew, x, lds[l], R, p.width[l], p.by_WT[l], p.width[l + 1], static_cast<T*>(nullptr),
                      [&](T* a, i64 row, i64 column) { epilogue(a, row * lds[l + 1] + column, column); });
  }
  template <class Epilogue>
  HJEPA_INLINE void down(const T* x, int l, Epilogue epilogue) const {
    product<Plain<T>>(crew, x, lds[l + 1], R, p.width[l + 1], p.by_W[l], p.width[l], static_cast<T*>(nullptr),
                      [&](T* a, i64 row, i64 column) { epilogue(a, row * lds[l] + column, column); });
  }

  // Numbers that restore an evaluation, besides the outputs: a_l, then g_l.
  i64 saved_width() const {
    i64 n = 0;
    for (int l = 1; l < p.L; ++l) n += 2 * p.width[l];
    return n;
  }

  // f(l, a_l, g_l) for the hidden layers' places in what is saved.
  template <class F>
  HJEPA_INLINE void over_saved(T* saved, F f) const {
    T* g_l = saved + saved_width() / 2;
    for (int l = 1; l < p.L; saved += p.width[l], g_l += p.width[l], ++l) f(l, saved, g_l);
  }

  // The outputs of z_0. Rows of what is saved are `stride` apart; null if it is not wanted.
  void run(T* saved, i64 stride) {
    T* keep[MAX_LAYERS + 1] = {};
    if (saved) over_saved(saved, [&](int l, T* a, T*) { keep[l] = a; });
    for (int l = 0; l < p.L; ++l)
      up(z(l), l, [&](T* a, i64 at, i64 column) {
        for (i64 i = 0; i < NR<T>; i += LANES<T>) store(a + i, load(a + i) + load(p.b[l] + column + i));
        if (keep[l + 1]) put(keep[l + 1] + (at - column) / lds[l + 1] * stride, a, column, p.width[l + 1]);
        if (l + 1 == p.L)
          for (i64 i = 0; i < NR<T>; i += LANES<T>) store(y + at + i, load(a + i));
        else if (tangents)
          activate<T>(p.activation[l], a, z(l + 1) + at, d[l + 1] + at, curve[l + 1] + at, NR<T>);
        else
          activate<T>(p.activation[l], a, z(l + 1) + at, d[l + 1] + at, NR<T>);
      });
  }

  // As `run` and `pull` left everything but the outputs.
  void restore(const T* saved, i64 stride) {
    over_saved(const_cast<T*>(saved), [&](int l, const T* a, const T* g_l) {
      for (i64 row = 0; row < R; ++row)
        for (i64 column = 0; column < p.width[l]; column += NR<T>) {
          const i64 at = row * lds[l] + column;
          alignas(HJEPA_VECTOR_BYTES) T block[NR<T>];
          for (i64 i = 0; i < NR<T>; i += LANES<T>)
            store(block + i, load_first(a + row * stride + column + i, p.width[l] - column - i));
          activate<T>(p.activation[l - 1], block, z(l) + at, d[l] + at, curve[l] + at, NR<T>);
          for (i64 i = 0; i < NR<T>; i += LANES<T>) {
            const Vec<T> own = load_first(g_l + row * stride + column + i, p.width[l] - column - i);
            store(g[l] + at + i, own);
            store(e(l) + at + i, own * load(d[l] + at + i));
          }
        }
    });
  }

  // From e_L: the gradient with respect to z_0 is added to of_x.
  void pull(T* of_x, T* saved, i64 stride) {
    T* keep[MAX_LAYERS + 1] = {};
    if (saved) over_saved(saved, [&](int l, T*, T* g_l) { keep[l] = g_l; });
    for (int l = p.L - 1; l >= 0; --l)
      down(e(l + 1), l, [&](T* x, i64 at, i64 column) {
        if (keep[l]) put(keep[l] + (at - column) / lds[l] * stride, x, column, p.width[l]);
        for (i64 i = 0; i < NR<T>; i += LANES<T>) {
          const Vec<T> own = load(x + i);
          if (!l) {
            store(of_x + at + i, load(of_x + at + i) + own);
            continue;
          }
          if (tangents) store(g[l] + at + i, own);
          store(e(l) + at + i, own * load(d[l] + at + i));
        }
      });
  }

  // From z'_0, after `pull`: the tangents of the outputs.
  void push() {
    for (int l = 0; l < p.L; ++l)
      up(zd(l), l, [&](T* a, i64 at, i64) {
        for (i64 i = 0; i < NR<T>; i += LANES<T>) {
          const Vec<T> own = load(a + i);
          if (l + 1 == p.L) {
            store(yd + at + i, own);
            continue;
          }
          store(zd(l + 1) + at + i, own * load(d[l + 1] + at + i));
          store(bend[l + 1] + at + i, own * load(g[l + 1] + at + i) * load(curve[l + 1] + at + i));
        }
      });
  }

  // From r_L: the tangent of `pull`'s gradient is added to of_x. Without `push` z'_0 is zero.
  void pull_tangent(T* of_x, bool pushed) {
    for (int l = p.L - 1; l >= 0; --l)
      down(r(l + 1), l, [&](T* x, i64 at, i64) {
        for (i64 i = 0; i < NR<T>; i += LANES<T>) {
          const Vec<T> own = load(x + i);
          if (!l) {
            store(of_x + at + i, load(of_x + at + i) + own);
            continue;
          }
          const Vec<T> r_l = own * load(d[l] + at + i);
          store(r(l) + at + i, pushed ? r_l + load(bend[l] + at + i) : r_l);
        }
      });
  }

  // After `pull_tangent`.
  void add_to(const Sums<T>& sums, bool pushed) const {
    for (int l = 0; l < p.L; ++l) {
      const T *of_output = pushed ? left[l + 1] : r(l + 1), *of_input = pushed ? right[l] : z(l);
      const i64 rows = pushed ? 2 * R : R, m = p.width[l + 1], n = p.width[l];
      if (l)
        add_outer(crew, of_output, lds[l + 1], m, of_input, lds[l], n, rows, sums.W[l], lds[l]);
      else
        add_outer(crew, of_input, lds[0], n, of_output, lds[1], m, rows, sums.W[0], lds[1]);
      // a tile's sum is formed before it is added to those of others: one number after the other would lose a digit
      crew.template over_columns<T>(m, [&](i64 i) {
        Vec<T> db = {};
        for (i64 k = 0; k < R; ++k) db += load(r(l + 1) + k * lds[l + 1] + i);
        store(sums.b[l] + i, load(sums.b[l] + i) + db);
      });
    }
  }
};

HJEPA_INLINE float exponential(float x) { return __builtin_expf(x); }
HJEPA_INLINE double exponential(double x) { return __builtin_exp(x); }
HJEPA_INLINE float log_of_1_plus(float x) { return __builtin_log1pf(x); }
HJEPA_INLINE double log_of_1_plus(double x) { return __builtin_log1p(x); }

// f = (Hp, -Hq) at states y, and the Hessian of H there. Rows of states are s numbers apart.
template <class T>
struct SystemTile {
  const Mechanical<T>& p;
  const Crew& crew;
  const i64 R, d, s, sx, sm;
  DenseTile<T> V, N;
  T *of_x, *of_x_tangent;          // [R, sx]
  T* x;                            // features
  T *positive, *slope, *bend, *w;  // L's or M^-1's entries as they are, s' and s'' of the diagonal ones, L^T p
  T *c, *c_tangent;                // dT/dy and its tangent, [R, sm]
  const T* at = nullptr;           // y

  SystemTile(const Mechanical<T>& p, const Crew& crew, i64 rows, i64 R, bool tangents, Pieces<T>& pieces)
      : p(p), crew(crew), R(R), d(p.d), s(ld<T>(2 * p.d)), sx(ld<T>(p.n)), sm(ld<T>(p.m)),
        V(p.V, crew, rows, R, tangents, pieces), N(p.N, crew, rows, R, tangents, pieces) {
    for (T** t : {&of_x, &of_x_tangent, &x}) *t = pieces.take(rows * sx);
    for (T** t : {&positive, &c, &c_tangent}) *t = pieces.take(rows * sm);
    for (T** t : {&slope, &bend, &w}) *t = pieces.take(rows * d);
  }

  // The number of L's entry below the diagonal, i > j.
  HJEPA_INLINE i64 below(i64 i, i64 j) const { return p.below[i] + j; }
  HJEPA_INLINE T lower(const T* L, i64 i, i64 j) const { return L[i == j ? i : below(i, j)]; }

  void set_features() {
    const int k = p.n_others, a = p.n_angles;
    for (i64 r = 0; r < R; ++r)
      for (int i = 0; i < k; ++i) x[r * sx + i] = at[r * s + p.others[i]];
    // a vector of rows at a time
    for (int i = 0; i < a; ++i)
      for (i64 r = 0; r < R; r += LANES<T>) {
        const i64 n = R - r < LANES<T> ? R - r : LANES<T>;
        Vec<T> q = {}, sine, cosine;
        for (i64 j = 0; j < n; ++j) q[j] = at[(r + j) * s + p.angles[i]];
        sincos(q, sine, cosine);
        for (i64 j = 0; j < n; ++j) x[(r + j) * sx + k + i] = cosine[j], x[(r + j) * sx + k + a + i] = sine[j];
      }
  }

  void set_input(T* to) const { copy_rows(to, sx, x, sx, R, p.n); }

  // Hp into u, [R, s], and dT/dy.
  void kinetic(T* u) {
    for (i64 r = 0; r < R; ++r) {
      const T *mom = at + r * s + d, *y = p.N.L ? N.y + r * sm : p.entries;
      T *to = u + r * s, *l = positive + r * sm, *s1 = slope + r * d, *s2 = bend + r * d, *wr = w + r * d, *cr = c + r * sm;
      if (p.mass == Mass::identity) {
        for (i64 i = 0; i < d; ++i) to[i] = mom[i];
        continue;
      }
      for (i64 i = 0; i < p.m; ++i) l[i] = y[i];
      for (i64 i = 0; i < d; ++i) {
        s1[i] = 1, s2[i] = 0;
        if (p.softplus && y[i] <= T(20)) {  // PyTorch's threshold
          const T small = exponential(y[i] < 0 ? y[i] : -y[i]), sigma = (y[i] < 0 ? small : T(1)) / (1 + small);
          l[i] = (y[i] > 0 ? y[i] : T(0)) + log_of_1_plus(small);
          s1[i] = sigma, s2[i] = sigma * (1 - sigma);
        } else if (p.softplus && !(y[i] == y[i])) {
          s1[i] = s2[i] = y[i];
        }
      }
      if (p.mass == Mass::diagonal) {
        for (i64 i = 0; i < d; ++i) {
          l[i] += p.epsilon;
          to[i] = l[i] * mom[i];
          cr[i] = T(0.5) * s1[i] * mom[i] * mom[i];
        }
        continue;
      }
      for (i64 j = 0; j < d; ++j) {
        T sum = 0;
        for (i64 i = j; i < d; ++i) sum += lower(l, i, j) * mom[i];
        wr[j] = sum;
      }
      for (i64 i = 0; i < d; ++i) {
        T sum = p.epsilon * mom[i];
        for (i64 j = 0; j <= i; ++j) sum += lower(l, i, j) * wr[j];
        to[i] = sum;
        cr[i] = s1[i] * mom[i] * wr[i];
        for (i64 j = 0; j < i; ++j) cr[below(i, j)] = mom[i] * wr[j];
      }
    }
  }

  // Parts of what restores an evaluation: the gradient with respect to the features, the entries, each network's layers.
  T* saved_entries(T* saved) const { return saved + p.n; }
  T* saved_V(T* saved) const { return saved ? saved + p.n + (p.N.L ? p.m : 0) : nullptr; }
  T* saved_N(T* saved) const { return saved ? saved_V(saved) + (p.V.L ? V.saved_width() : 0) : nullptr; }

  // f [R, s] at y [R, s], zeros where it is not asked for; and what `adjoint` needs. What restores it goes to `saved`, rows
  // `stride` apart, if that is not null.
  void evaluate(const T* y, bool of_p, bool of_q, T* f, T* saved = nullptr, i64 stride = 0) {
    at = y;
    set_features();
    if (p.N.L) {
      set_input(N.z(0));
      N.run(saved_N(saved), stride);
      if (saved) copy_rows(saved_entries(saved), stride, N.y, sm, R, p.m);
    }
    kinetic(f);
    if (!of_p)
      for (i64 r = 0; r < R; ++r) clear(f + r * s, d);
    if (!of_q) {
      for (i64 r = 0; r < R; ++r) clear(f + r * s + d, d);
      return;
    }
    clear(of_x, R * sx);
    if (p.V.L) {
      run_V(saved_V(saved), stride);
      set_unit();
      V.pull(of_x, saved_V(saved), stride);
    }
    if (p.N.L) {
      copy_rows(N.e(p.N.L), sm, c, sm, R, p.m);
      N.pull(of_x, saved_N(saved), stride);
    }
    if (saved) copy_rows(saved, stride, of_x, sx, R, p.n);
    pull_features(of_x, T(-1), f + d);
  }

  // As `evaluate` left everything, but f, of which Hp alone is formed.
  void restore(const T* y, bool of_q, const T* tape, i64 stride, T* f) {
    T* saved = const_cast<T*>(tape);
    at = y;
    set_features();
    if (p.N.L) {
      set_input(N.z(0));
      N.restore(saved_N(saved), stride);
      copy_rows(N.y, sm, saved_entries(saved), stride, R, p.m);
    }
    kinetic(f);
    if (!of_q) return;
    copy_rows(of_x, sx, saved, stride, R, p.n);
    if (p.V.L) {
      set_input(V.z(0));
      V.restore(saved_V(saved), stride);
      set_unit();
    }
    if (p.N.L) copy_rows(N.e(p.N.L), sm, c, sm, R, p.m);
  }

  void run_V(T* saved = nullptr, i64 stride = 0) {
    set_input(V.z(0));
    V.run(saved, stride);
  }

  // V's cotangent.
  void set_unit() {
    for (i64 r = 0; r < R; ++r) V.e(p.V.L)[r * V.lds[p.V.L]] = 1;
  }

  // factor x'(q)^T g, for g [R, sx], to rows of numbers that are s apart.
  void pull_features(const T* g, T factor, T* to) const {
    const int k = p.n_others, a = p.n_angles;
    for (i64 r = 0; r < R; ++r) {
      const T *own = g + r * sx, *xr = x + r * sx;
      for (int i = 0; i < k; ++i) to[r * s + p.others[i]] = factor * own[i];
      for (int i = 0; i < a; ++i) to[r * s + p.angles[i]] = factor * (xr[k + i] * own[k + a + i] - xr[k + a + i] * own[k + i]);
    }
  }

  // z'_0 of a network: x'(q) v.
  void push_features(const T* v, T* to) const {
    const int k = p.n_others, a = p.n_angles;
    for (i64 r = 0; r < R; ++r) {
      const T *vr = v + r * s, *xr = x + r * sx;
      T* own = to + r * sx;
      for (int i = 0; i < k; ++i) own[i] = vr[p.others[i]];
      for (int i = 0; i < a; ++i) {
        own[k + i] = -xr[k + a + i] * vr[p.angles[i]];
        own[k + a + i] = xr[k + i] * vr[p.angles[i]];
      }
    }
  }

  // Tangents of Hp, to `to`, and of dT/dy, along v and, if `pushed`, the network's y'.
  void kinetic_tangent(const T* v, bool pushed, T* to) {
    for (i64 r = 0; r < R; ++r) {
      const T *mom = at + r * s + d, *pd = v + r * s + d, *l = positive + r * sm, *s1 = slope + r * d, *s2 = bend + r * d;
      const T *wr = w + r * d, *yd = pushed ? N.yd + r * sm : nullptr;
      T *own = to + r * s + d, *cr = c_tangent + r * sm;
      if (p.mass == Mass::identity) {
        for (i64 i = 0; i < d; ++i) own[i] = pd[i];
      } else if (p.mass == Mass::diagonal) {
        for (i64 i = 0; i < d; ++i) {
          own[i] = l[i] * pd[i];
          cr[i] = s1[i] * mom[i] * pd[i];
          if (!yd) continue;
          own[i] += s1[i] * yd[i] * mom[i];
          cr[i] += T(0.5) * s2[i] * yd[i] * mom[i] * mom[i];
        }
      } else {
        const auto tangent = [&](i64 i, i64 j) { return !yd ? T(0) : i == j ? s1[i] * yd[i] : yd[below(i, j)]; };
        T wd[MAX_COORDINATES];
        for (i64 j = 0; j < d; ++j) {
          wd[j] = 0;
          for (i64 i = j; i < d; ++i) wd[j] += tangent(i, j) * mom[i] + lower(l, i, j) * pd[i];
        }
        for (i64 i = 0; i < d; ++i) {
          T sum = p.epsilon * pd[i];
          for (i64 j = 0; j <= i; ++j) sum += tangent(i, j) * wr[j] + lower(l, i, j) * wd[j];
          own[i] = sum;
          cr[i] = s1[i] * (pd[i] * wr[i] + mom[i] * wd[i]);
          if (yd) cr[i] += s2[i] * yd[i] * mom[i] * wr[i];
          for (i64 j = 0; j < i; ++j) cr[below(i, j)] = pd[i] * wr[j] + mom[i] * wd[j];
        }
      }
    }
  }

  // The gradient of v . grad H + e H, v [R, s] = (vq, vp), after `evaluate` with everything that v looks at: with respect to z, to
  // `to`; and to the parameters, added to `sums` if it is not null. Without `along_q` vq is zero; e may be null. hp is Hp.
  void adjoint(const T* v, bool along_q, const T* e, const T* hp, T* to, const MechanicalSums<T>* sums) {
    const int LV = p.V.L, LN = p.N.L;
    if (LN && along_q) {
      push_features(v, N.zd(0));
      N.push();
    }
    kinetic_tangent(v, LN && along_q, to);
    if (e)
      for (i64 r = 0; r < R; ++r) {
        for (i64 i = 0; i < d; ++i) to[r * s + d + i] += e[r] * hp[r * s + i];
        for (i64 i = 0; i < p.m; ++i) c_tangent[r * sm + i] += e[r] * c[r * sm + i];
      }
    clear(of_x_tangent, R * sx);
    if (LV && (along_q || e)) {
      if (along_q) {
        push_features(v, V.zd(0));
        V.push();
      } else {
        run_V();
      }
      for (i64 r = 0; r < R; ++r) V.r(LV)[r * V.lds[LV]] = e ? e[r] : T(0);
      V.pull_tangent(of_x_tangent, along_q);
      if (sums) V.add_to(sums->V, along_q);
    }
    if (LN) {
      copy_rows(N.r(LN), sm, c_tangent, sm, R, p.m);
      N.pull_tangent(of_x_tangent, along_q);
      if (sums) N.add_to(sums->N, along_q);
    } else if (sums && sums->entries) {
      for (i64 i = 0; i < p.m; ++i) {
        T sum = 0;
        for (i64 r = 0; r < R; ++r) sum += c_tangent[r * sm + i];
        sums->entries[i] += sum;
      }
    }
    pull_features(of_x_tangent, T(1), to);
    if (!along_q) return;
    const int k = p.n_others, a = p.n_angles;
    for (i64 r = 0; r < R; ++r)
      for (int i = 0; i < a; ++i) {
        const T *own = of_x + r * sx, *xr = x + r * sx;
        to[r * s + p.angles[i]] -= (xr[k + i] * own[k + i] + xr[k + a + i] * own[k + a + i]) * v[r * s + p.angles[i]];
      }
  }
};

// Coefficients of a sub-step: what f is multiplied with in q and p, for the move and for the point.
template <class T>
struct Coefficients {
  T move_q, move_p, point_q, point_p;
  bool implicit, of_p, of_q;

  Coefficients(const Mechanical<T>& p, int i)
      : move_q(T(p.scheme[4 * i + 1])), move_p(T(p.scheme[4 * i])), point_q(T(p.scheme[4 * i + 3])),
        point_p(T(p.scheme[4 * i + 2])), implicit(point_q != 0 || point_p != 0), of_p(implicit || p.mixes || move_q != 0),
        of_q(implicit || p.mixes || move_p != 0) {}
  HJEPA_INLINE T move(i64 i, i64 d) const { return i < d ? move_q : move_p; }
  HJEPA_INLINE T point(i64 i, i64 d) const { return i < d ? point_q : point_p; }
};

template <class T>
struct StatesTile {
  const Mechanical<T>& p;
  Crew crew{nullptr, 0, 1};
  const i64 R, width, s;
  SystemTile<T> at;
  T *z, *y, *target, *f, *history, *v, *nu, *direction, *w;
  FixedPoint<T> solver;

  StatesTile(const Mechanical<T>& p, i64 rows, i64 R, bool backward, Pieces<T>& pieces)
      : p(p), R(R), width(2 * p.d), s(ld<T>(2 * p.d)), at(p, crew, rows, R, backward, pieces),
        solver(p.implicit ? rows : 0, 2 * p.d, ld<T>(2 * p.d), pieces) {
    const i64 all = rows * s, n_sub = p.n_sub ? p.n_sub : 1;
    for (T** x : {&z, &y, &target}) *x = pieces.take(all);
    f = pieces.take(n_sub * all);
    v = pieces.take(backward ? n_sub * all : 0);
    for (T** x : {&nu, &direction, &w}) *x = pieces.take(backward ? all : 0);
    history = pieces.take(p.implicit && !backward ? n_sub * EXTRAPOLATION * all : 0);
    if (!pieces.base) return;
    // the solver reads whole vectors
    for (T* x : {z, y, target}) clear(x, all);
    for (T* x : {nu, direction, w}) clear(x, backward ? all : 0);
  }

  T* field(int i) const { return f + i * R * s; }
  T* tape_at(i64 row, i64 t, int i) const { return p.tape + ((row * p.n_steps + t) * p.n_sub + i) * p.tape_width; }
  i64 tape_stride() const { return p.n_steps * p.n_sub * p.tape_width; }
  T* saved_at(i64 row, i64 t, int i) const { return p.tape_layers ? tape_at(row, t, i) + 2 * width : nullptr; }
  HJEPA_INLINE T step(i64 row, i64 r, i64 t) const { return p.dt[(row + r) * p.dt_stride + t]; }

  // g(row, i) for each number of the states.
  template <class G>
  HJEPA_INLINE void each(G g) const {
    for (i64 r = 0; r < R; ++r)
      for (i64 i = 0; i < width; ++i) g(r, i);
  }

  T mixed(int i, i64 at) const {
    T sum = field(i)[at];
    for (int j = 0; p.mixes && j < i; ++j) sum += T(p.mix[i * p.n_sub + j]) * field(j)[at];
    return sum;
  }

  void find_point(const Coefficients<T>& k, int i, i64 row, i64 t) {
    const i64 all = R * s;
    T *own = field(i), *last = history + i * EXTRAPOLATION * all;
    const int known = t - p.begin < EXTRAPOLATION ? int(t - p.begin) : EXTRAPOLATION;
    const auto ago = [&](i64 n) { return last + (t - n) % EXTRAPOLATION * all; };  // a ring: what was found n steps ago
    each([&](i64 r, i64 c) {
      T guess = z[r * s + c];
      for (int n = 0; n < known; ++n) guess += T(extrapolation(known, n)) * ago(n + 1)[r * s + c];
      y[r * s + c] = guess;
    });
    solver.solve(crew, y, target, R, T(1), p.tolerance, p.max_evaluations, [&] {
      at.evaluate(y, true, true, own, saved_at(row, t, i), tape_stride());
      each([&](i64 r, i64 c) { target[r * s + c] = z[r * s + c] + step(row, r, t) * k.point(c, p.d) * own[r * s + c]; });
    });
    each([&](i64 r, i64 c) { ago(0)[r * s + c] = step(row, r, t) * k.point(c, p.d) * own[r * s + c]; });
    for (i64 r = 0; r < R; ++r) {
      T& residual = p.residual[(row + r) * p.n_steps + t];
      if (!(solver.residual[r] <= residual)) residual = solver.residual[r];
      p.evaluations[(row + r) * p.n_steps + t] += std::int32_t(solver.evaluations[r]);
    }
  }

  void forward(i64 row) {
    const i64 path = (p.n_steps + 1) * width;
    copy_rows(z, s, p.states + row * path + p.begin * width, path, R, width);
    for (i64 t = p.begin; t < p.end; ++t) {
      for (i64 r = 0; p.implicit && r < R; ++r)
        p.residual[(row + r) * p.n_steps + t] = 0, p.evaluations[(row + r) * p.n_steps + t] = 0;
      for (int i = 0; i < p.n_sub; ++i) {
        const Coefficients<T> k(p, i);
        if (k.implicit)
          find_point(k, i, row, t);
        else
          at.evaluate(z, k.of_p, k.of_q, field(i), saved_at(row, t, i), tape_stride());
        if (p.tape) {
          copy_rows(tape_at(row, t, i), tape_stride(), k.implicit ? y : z, s, R, width);
          copy_rows(tape_at(row, t, i) + width, tape_stride(), field(i), s, R, width);
        }
        each([&](i64 r, i64 c) { z[r * s + c] += step(row, r, t) * k.move(c, p.d) * mixed(i, r * s + c); });
      }
      copy_rows(p.states + row * path + (t + 1) * width, path, z, s, R, width);
    }
  }

  // direction = -J x, the cotangent of (Hq, Hp) from that of f.
  void turn(const T* x) {
    for (i64 r = 0; r < R; ++r)
      for (i64 i = 0; i < p.d; ++i) {
        direction[r * s + i] = -x[r * s + p.d + i];
        direction[r * s + p.d + i] = x[r * s + i];
      }
  }

  // The adjoint of sub-step i; z is the cotangent of the state.
  void substep_back(int i, i64 row, i64 t, const MechanicalSums<T>* sums) {
    const Coefficients<T> k(p, i);
    T* own = v + i * R * s;
    for (i64 r = 0; r < R; ++r) {
      T sum = 0;
      for (i64 c = 0; c < width; ++c) {
        const T u = k.move(c, p.d) * z[r * s + c];
        sum += u * mixed(i, r * s + c);
        own[r * s + c] = w[r * s + c] = step(row, r, t) * u;
        for (int j = i + 1; p.mixes && j < p.n_sub; ++j) w[r * s + c] += T(p.mix[j * p.n_sub + i]) * v[(j * R + r) * s + c];
      }
      p.gdt[(row + r) * p.n_steps + t] += sum;
    }
    copy_rows(y, s, tape_at(row, t, i), tape_stride(), R, width);
    // f is known; what it leaves behind may not be
    if (p.tape_layers)
      at.restore(y, k.of_q, saved_at(row, t, i), tape_stride(), target);
    else
      at.evaluate(y, k.of_p, k.of_q, target);
    if (k.implicit) {
      constexpr T tiny = sizeof(T) == 4 ? T(1.1754944e-38) : T(2.2250738585072014e-308);
      solver.solve(crew, w, target, R, tiny, p.tolerance, p.max_evaluations, [&] {
        turn(w);
        at.adjoint(direction, true, nullptr, nullptr, nu, nullptr);
        each([&](i64 r, i64 c) { target[r * s + c] = own[r * s + c] + step(row, r, t) * k.point(c, p.d) * nu[r * s + c]; });
      });
      for (i64 r = 0; r < R; ++r)
        if (solver.residual[r] > p.residual[row + r]) p.residual[row + r] = solver.residual[r];
    }
    turn(w);
    at.adjoint(direction, k.of_q, nullptr, nullptr, nu, sums);
    for (i64 r = 0; r < R; ++r) {
      T sum = 0;
      for (i64 c = 0; c < width; ++c) {
        sum += k.point(c, p.d) * nu[r * s + c] * field(i)[r * s + c];
        z[r * s + c] += nu[r * s + c];
      }
      if (k.implicit) p.gdt[(row + r) * p.n_steps + t] += sum;
    }
  }

  void backward(i64 row, const MechanicalSums<T>* sums) {
    copy_rows(z, s, p.later + row * width, width, R, width);
    for (i64 t = p.end - 1; t >= p.begin; --t) {
      if (p.g_states) each([&](i64 r, i64 c) { z[r * s + c] += p.g_states[((row + r) * p.n_steps + t) * width + c]; });
      for (i64 r = 0; r < R; ++r) p.gdt[(row + r) * p.n_steps + t] = 0;
      for (int i = 0; i < p.n_sub; ++i) copy_rows(field(i), s, tape_at(row, t, i) + width, tape_stride(), R, width);
      for (int i = p.n_sub - 1; i >= 0; --i) substep_back(i, row, t, sums);
    }
    copy_rows(p.later + row * width, width, z, s, R, width);
  }

  void gradient(i64 row) {
    copy_rows(z, s, p.z + row * width, width, R, width);
    at.evaluate(z, true, true, f);
    for (i64 r = 0; r < R; ++r)
      for (i64 i = 0; i < p.d; ++i) {
        T* to = p.gradient + (row + r) * width;
        to[i] = -f[r * s + p.d + i];
        to[p.d + i] = f[r * s + i];
      }
  }

  void gradient_backward(i64 row, const MechanicalSums<T>* sums) {
    copy_rows(z, s, p.z + row * width, width, R, width);
    at.evaluate(z, true, p.v != nullptr, f);
    if (p.v) copy_rows(direction, s, p.v + row * width, width, R, width);
    at.adjoint(direction, p.v != nullptr, p.e ? p.e + row : nullptr, f, nu, sums);
    copy_rows(p.g_z + row * width, width, nu, s, R, width);
  }
};

template <class T>
i64 states_scratch(const Mechanical<T>& p, i64 rows, bool backward) {
  Pieces<T> pieces{nullptr};
  StatesTile<T> tile(p, rows, rows, backward, pieces);
  return pieces.used;
}

// f(a tile, its first row) for even tiles of at most `rows` of the rows row..last-1.
template <class T, class F>
HJEPA_INLINE void over_tiles(const Mechanical<T>& p, i64 row, i64 last, i64 rows, bool backward, T* scratch, F f) {
  const i64 n = last - row, tiles = (n + rows - 1) / rows;
  for (i64 i = 0; i < tiles; ++i) {
    const i64 from = row + n * i / tiles;
    Pieces<T> pieces{scratch};
    StatesTile<T> tile(p, rows, row + n * (i + 1) / tiles - from, backward, pieces);
    f(tile, from);
  }
}

template <class T>
void states_forward(const Mechanical<T>& p, i64 row, i64 last, i64 rows, T* scratch) {
  over_tiles(p, row, last, rows, false, scratch, [](StatesTile<T>& tile, i64 from) { tile.forward(from); });
}

template <class T>
void states_gradient(const Mechanical<T>& p, i64 row, i64 last, i64 rows, T* scratch) {
  over_tiles(p, row, last, rows, false, scratch, [](StatesTile<T>& tile, i64 from) { tile.gradient(from); });
}

template <class T>
void states_backward(const Mechanical<T>& p, i64 row, i64 last, i64 rows, T* scratch, const MechanicalSums<T>* sums) {
  over_tiles(p, row, last, rows, true, scratch, [=](StatesTile<T>& tile, i64 from) { tile.backward(from, sums); });
}

template <class T>
void states_gradient_backward(const Mechanical<T>& p, i64 row, i64 last, i64 rows, T* scratch, const MechanicalSums<T>* sums) {
  over_tiles(p, row, last, rows, true, scratch, [=](StatesTile<T>& tile, i64 from) { tile.gradient_backward(from, sums); });
}

}  // namespace hjepa_fast::HJEPA_ISA
