// The loop for many rows: a tile of rows goes through the whole rollout, with products of all its rows at a time. A thread
// has a tile to itself, or where there are too few rows for that a crew of threads shares one and divides its columns.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// Coefficients of a sub-step, see hjepa_fast/schemes.py.
template <class T>
struct SubStep {
  T kick, drift, implicit_kick, implicit_drift;
  bool implicit;

  SubStep(const Problem<T>& p, int i)
      : kick(T(p.scheme[4 * i])), drift(T(p.scheme[4 * i + 1])), implicit_kick(T(p.scheme[4 * i + 2])),
        implicit_drift(T(p.scheme[4 * i + 3])), implicit(implicit_kick != 0 || implicit_drift != 0) {}
};

// Of the first row's sub-step i of step t, and from one row to the next.
template <class T>
HJEPA_INLINE T* tape_at(const Problem<T>& p, i64 row, i64 t, int i) {
  return p.tape + ((row * p.n_steps + t) * p.n_sub + i) * p.tape_width;
}
template <class T>
HJEPA_INLINE i64 tape_stride(const Problem<T>& p) {
  return p.n_steps * p.n_sub * p.tape_width;
}

template <class P>
struct ForwardTile {
  using T = typename P::Scalar;
  const Problem<T>& p;
  Crew& crew;
  Network<P> at;
  T *step, *sq, *sp;
  // of implicit sub-steps: a where one starts; where the gradient at y takes it; how far that was in the last few steps,
  // for each sub-step the last one first
  T *base, *target, *history;
  FixedPoint<T> point;
  i64 rows;

  ForwardTile(const Problem<T>& p, Crew& crew, i64 rows, Pieces<T>& pieces)
      : p(p), crew(crew), at(p, crew, rows, pieces), point(p.implicit ? rows : 0, p.width[0], ld<T>(p.width[0]), pieces),
        rows(rows) {
    const i64 all = rows * ld<T>(p.width[0]);
    for (T** x : {&step, &sq, &sp}) *x = pieces.take(all);
    for (T** x : {&base, &target}) *x = pieces.take(p.implicit ? all : 0);
    history = pieces.take(p.implicit ? p.n_sub * EXTRAPOLATION * all : 0);
  }

  // to += c step K, or with K^T for a kick
  void add_product(bool kick, T c, T* to, i64 R) {
    const i64 h = p.width[0], w = at.w;
    if (kick) c = -c;
    product<P>(crew, step, w, R, h, kick ? p.by_KT : p.by_K, h, at.converted, [=](T* x, i64 r, i64 column) {
      T* y = to + r * w + column;
      for (i64 j = 0; j < NR<T>; j += LANES<T>) store(y + j, load(y + j) + c * load(x + j));
    });
  }

  // step = dt delta, in the crew's own columns
  void set_step(i64 row, i64 R, i64 t) {
    const i64 w = at.w;
    crew.template over_own<T>(R, p.width[0], [&](i64 r, i64 c) {
      store(step + r * w + c, p.dt[(row + r) * p.dt_stride + t] * load(at.e[0] + r * w + c));
    });
  }

  // The point of an implicit sub-step into a, delta there and `step`; a where the sub-step starts into `base`.
  void find_point(const SubStep<T>& s, int i, i64 row, i64 R, i64 t, const Layers<T>& keep) {
    const i64 h = p.width[0], w = at.w, all = rows * w;
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
    const i64 w = at.w;
    T kick = s.kick, drift = s.drift, share = 0;
    if (s.implicit_kick && s.implicit_drift) {
      if (s.kick * s.implicit_drift == s.drift * s.implicit_kick) share = s.kick / s.implicit_kick, kick = drift = 0;
    } else if (s.implicit_kick) {
      share = s.kick / s.implicit_kick, kick = 0;
    } else {
      share = s.drift / s.implicit_drift, drift = 0;
    }
    crew.template over_own<T>(R, p.width[0], [&](i64 r, i64 c) {
      const i64 j = r * w + c;
      store(at.a + j, load(base + j) + share * (load(target + j) - load(base + j)));
    });
    if (kick) add_product(true, kick, at.a, R);
    if (drift) add_product(false, drift, at.a, R);
  }

  void run(i64 row, i64 R) {
    const i64 h = p.width[0], w = at.w, state = p.n_kept * h, first = p.n_kept > 1 ? (p.begin - 1) * h : 0;
    T* a = at.a;
    if (crew.thread == 0) {
      for (T* x : {a, sq, sp}) clear(x, R * w);
      copy_rows(a, w, p.a + row * h, h, R, h);
      if (p.begin) {
        copy_rows(sq, w, p.sq + row * state + first, state, R, h);
        copy_rows(sp, w, p.sp + row * state + first, state, R, h);
      }
    }
    int counted;
    for (i64 t = p.begin + crew.start(counted); t < p.end; ++t) {
      if (crew.may_let_in(t - p.begin)) crew.let_in(t - p.begin, 0);
      if (p.implicit)
        for (i64 r = crew.first(R); r < crew.last(R); ++r)
          p.residual[(row + r) * p.n_steps + t] = 0, p.evaluations[(row + r) * p.n_steps + t] = 0;
      for (int i = 0; i < p.n_sub; ++i) {
        const SubStep<T> s(p, i);
        const auto keep = Layers<T>::on(tape_at(p, row, t, i), tape_stride(p), p);
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

// The adjoint, whose equations are in hjepa_fast/backends/torch.py.
template <class P>
struct BackwardTile {
  using T = typename P::Scalar;
  const Problem<T>& p;
  Crew& crew;
  NetworkAdjoint<P> at;
  const Sums<T>* sums;
  T *leftK, *rightK;  // factors of K's gradient
  i64 rowsK = 0;
  T *la, *lsq, *lsp, *u, *step;
  T *w_0, *target, *nu_N;  // of implicit sub-steps: w; w + c nu N^T; nu N^T
  FixedPoint<T> cotangent;

  BackwardTile(const Problem<T>& p, Crew& crew, i64 rows, Pieces<T>& pieces, const Sums<T>* sums)
      : p(p), crew(crew), at(p, crew, rows, pieces, sums), sums(sums),
        cotangent(p.implicit ? rows : 0, p.width[0], ld<T>(p.width[0]), pieces) {
    const i64 w = at.w;
    for (T** x : {&la, &lsq, &lsp, &u, &step}) *x = pieces.take(rows * w);
    const i64 most = sums ? at.capacity * (p.implicit ? 4 : 2) * rows * w : 0;
    leftK = pieces.take(most);
    rightK = pieces.take(most);
    for (T** x : {&w_0, &target, &nu_N}) *x = pieces.take(p.implicit ? rows * w : 0);
  }

  void flush(i64 R) {
    if (!at.gathered) return;
    crew.meet();
    add_outer(crew, leftK, at.w, at.h, rightK, at.w, at.h, rowsK, sums->K, at.w);
    rowsK = 0;
    at.flush(R);
    crew.meet();
  }

  // left^T (scale right), of R rows each, goes to the gradient of K
  void gather_K(const T* x, const T* y, T scale, i64 R) {
    const i64 w = at.w;
    T *to_left = leftK + rowsK * w, *to_right = rightK + rowsK * w;
    crew.template over_own<T>(R, at.h, [&](i64 r, i64 c) {
      const i64 j = r * w + c;
      store(to_left + j, load(x + j));
      store(to_right + j, scale * load(y + j));
    });
    rowsK += R;
  }

  // at.v <- the solution of v = w + c nu(v) N^T, where it is w at first
  void solve_cotangent(const SubStep<T>& s, i64 row, i64 R, i64 t) {
    const i64 h = p.width[0], w = at.w;
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(w_0 + r * w + c, load(at.v + r * w + c)); });
    const auto add = [&](const Right<T>& M, T c) {
      product<P>(crew, at.curve[0], w, R, h, M, h, at.converted, [=, this](T* x, i64 r, i64 column) {
        T* to = nu_N + r * w + column;
        for (i64 j = 0; j < NR<T>; j += LANES<T>) store(to + j, load(to + j) + c * load(x + j));
      });
    };
    constexpr T tiny = sizeof(T) == 4 ? T(1.1754944e-38) : T(2.2250738585072014e-308);
    cotangent.solve(crew, at.v, target, R, tiny, p.tolerance, p.max_evaluations, [&] {
      at.enter(R);
      at.adjoint(nullptr, 0, R, false);
      crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(nu_N + r * w + c, Vec<T>{}); });
      crew.meet();
      if (s.implicit_kick) add(p.by_K, -s.implicit_kick);
      if (s.implicit_drift) add(p.by_KT, s.implicit_drift);
      crew.template over_own<T>(R, h, [&](i64 r, i64 c) {
        const i64 j = r * w + c;
        store(target + j, load(w_0 + j) + p.dt[(row + r) * p.dt_stride + t] * load(nu_N + j));
      });
    });
    for (i64 r = crew.first(R); r < crew.last(R); ++r) {
      if (!(cotangent.residual[r] <= p.residual[row + r])) p.residual[row + r] = cotangent.residual[r];
      p.gdt[(row + r) * p.n_steps + t] += dot(nu_N + r * w, at.e[0] + r * w, h);
    }
  }

  void run(i64 row, i64 R) {
    const i64 h = p.width[0], w = at.w, state = p.n_kept * h;
    if (crew.thread == 0) {
      for (T* x : {la, lsq, lsp}) clear(x, R * w);
      at.clear_padding(R);
      copy_rows(la, w, p.la + row * h, h, R, h);
      copy_rows(lsq, w, p.lsq + row * h, h, R, h);
      copy_rows(lsp, w, p.lsp + row * h, h, R, h);
    }
    const i64 n = p.end - p.begin;
    int gathered;
    i64 done = crew.start(gathered);
    // the sums' parts must not depend on when a thread comes in: it goes on with what has been gathered
    at.gathered = gathered;
    for (i64 k = 0; k < gathered; ++k) rowsK += R * factors_of_K(SubStep<T>(p, int(k % p.n_sub)));
    for (; done < n; ++done) {
      if (crew.may_let_in(done)) crew.let_in(done, int(at.gathered));
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
  static i64 factors_of_K(const SubStep<T>& s) {
    return (s.kick != 0) + (s.drift != 0) + (s.implicit_kick != 0) + (s.implicit_drift != 0);
  }

  // to [R, ld] += from [R, strided], the crew's own columns
  void add_own(T* to, const T* from, i64 stride, i64 R) {
    i64 first, last;
    crew.template columns<T>(at.h, first, last);
    if (last > at.h) last = at.h;
    for (i64 r = 0; r < R; ++r)
      for (i64 c = first; c < last; ++c) to[r * at.w + c] += from[r * stride + c];
  }

  void sub_step(int i, i64 row, i64 R, i64 t) {
    const i64 h = p.width[0], w = at.w;
    const SubStep<T> s(p, i);
    at.restore(tape_at(p, row, t, i), tape_stride(p), R);
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(u + r * w + c, Vec<T>{}); });
    crew.meet();
    const auto add_to_u = [&](const Right<T>& M, T c, const T* l) {
      product<P>(crew, la, w, R, h, M, h, at.converted, [=, this](T* x, i64 r, i64 column) {
        const i64 to = r * w + column;
        for (i64 j = 0; j < NR<T>; j += LANES<T>) store(u + to + j, load(u + to + j) + c * (load(l + to + j) + load(x + j)));
      });
    };
    if (s.kick) add_to_u(p.by_K, -s.kick, lsp);
    if (s.drift) add_to_u(p.by_KT, s.drift, lsq);
    crew.template over_panels<T>(R, h, [&](i64 r, i64 column) {
      const i64 c = r * w + column;
      const T dt = p.dt[(row + r) * p.dt_stride + t];
      const T* delta = at.e[0] + c;
      Vec<T> u_delta = {};
      for (i64 j = 0; j < NR<T>; j += LANES<T>) {
        u_delta += load(u + c + j) * load(delta + j);
        store(at.v + c + j, dt * load(u + c + j));
        store(step + c + j, dt * load(delta + j));
      }
      at.row_sums.set(r, column, u_delta);
    });
    if (sums && s.kick) gather_K(la, step, -s.kick, R);
    if (sums && s.drift) gather_K(step, la, s.drift, R);
    crew.meet();
    for (i64 r = crew.first(R); r < crew.last(R); ++r) p.gdt[(row + r) * p.n_steps + t] += at.row_sums.total(r, h);
    if (s.implicit) solve_cotangent(s, row, R, t);
    at.enter(R);
    at.adjoint(i == 0 && p.gE ? p.gE + row * p.n_steps + t : nullptr, p.n_steps, R, sums != nullptr);
    const T* nu = at.curve[0];
    if (sums && s.implicit_kick) gather_K(nu, step, -s.implicit_kick, R);
    if (sums && s.implicit_drift) gather_K(step, nu, s.implicit_drift, R);
    crew.template over_own<T>(R, h, [&](i64 r, i64 c) { store(la + r * w + c, load(la + r * w + c) + load(nu + r * w + c)); });
    if (sums && ++at.gathered == at.capacity) flush(R);
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
  HJEPA_ALLOW(scratch, (forward_scratch<P>(p, rows, crew_size) * sizeof(T)));  // an earlier tile had other rows
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
