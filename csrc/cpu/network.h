// One network for the rows of a tile: its gradient delta, and the adjoint of that.
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

  // On a tape, whose rows are that far apart.
  static Layers on(T* tape, i64 stride, const Net<T>& p) {
    Layers to;
    i64 at = 0;
    for (int l = 0; l < (p.tape_layers ? p.L : p.tape_width > 0); at += p.width[l++]) to.a[l] = tape + at;
    for (int l = 0; p.tape_layers && l + 1 < p.L; at += p.width[l++]) to.g[l] = tape + at;
    for (int l = 0; l < p.L; ++l) to.stride[l] = stride;
    return to;
  }
};

// The network F for the rows of a tile: layer values with leading dimension ld(width), so that padding needs no care.
template <class P>
struct Network {
  using T = typename P::Scalar;
  const Net<T>& p;
  const Crew& crew;
  T* a;                              // [rows, ld(h)]
  T *e[MAX_LAYERS], *d[MAX_LAYERS];  // z_l, overwritten by e_l; s'(a_l)
  RowSums<T> row_sums;
  T* converted;                           // this thread's
  i64 h, w, lds[MAX_LAYERS], widest = 0;  // h_1; ld of each width, w = lds[0]

  Network(const Net<T>& p, const Crew& crew, i64 rows, Pieces<T>& pieces) : p(p), crew(crew), h(p.width[0]), w(ld<T>(h)) {
    for (int l = 0; l < p.L; ++l) {
      lds[l] = ld<T>(p.width[l]);
      widest = lds[l] > widest ? lds[l] : widest;
      e[l] = pieces.take(rows * lds[l]);
      d[l] = pieces.take(rows * lds[l]);
    }
    a = pieces.take(rows * w);
    row_sums = RowSums<T>(rows, widest, pieces);
    converted = pieces.take(P::DEPTH > 1 ? crew.all * rows * widest : 0) + crew.thread * rows * widest;
  }

  // From `a`, complete in this thread's columns, e[0] = delta in these; H [rows, strided] too if it is not null.
  void run(i64 R, T* H, i64 strideH, const Layers<T>& keep) {
    const int last = p.L - 1;
    // with one layer nobody has met since the others read what this overwrites
    if (last == 0) crew.meet();
    crew.template over_panels<T>(R, h, [&](i64 r, i64 column) { enter(0, a + r * w + column, r, column, H, keep); });
    for (int l = 0; l < last; ++l) {
      crew.meet();
      product<P>(crew, e[l], lds[l], R, p.width[l], p.by_WT[l], p.width[l + 1], converted, [&](T* x, i64 r, i64 column) {
        for (i64 i = 0; i < NR<T>; i += LANES<T>) store(x + i, load(x + i) + load(p.b[l] + column + i));
        enter(l + 1, x, r, column, H, keep);
      });
    }
    for (int l = last - 1; l >= 0; --l) {
      crew.meet();
      product<P>(crew, e[l + 1], lds[l + 1], R, p.width[l + 1], p.by_W[l], p.width[l], converted, [&](T* x, i64 r, i64 column) {
        if (keep.g[l]) put(keep.g[l] + r * keep.stride[l], x, column, p.width[l]);
        T *to = e[l] + r * lds[l] + column, *slope = d[l] + r * lds[l] + column;
        for (i64 i = 0; i < NR<T>; i += LANES<T>) store(to + i, load(x + i) * load(slope + i));
      });
    }
    if (!H) return;
    if (last == 0) crew.meet();
    for (i64 r = crew.first(R); r < crew.last(R); ++r) H[r * strideH] = row_sums.total(r, p.width[last]) + p.b[last][0];
  }

 private:
  // A panel x of a_l gives z_l and s', or at the last layer e_L = w s'.
  HJEPA_INLINE void enter(int l, const T* x, i64 r, i64 column, const T* H, const Layers<T>& keep) {
    if (keep.a[l]) put(keep.a[l] + r * keep.stride[l], x, column, p.width[l]);
    T *z = e[l] + r * lds[l] + column, *slope = d[l] + r * lds[l] + column;
    activate<T>(p.activation[l], x, z, slope, NR<T>);
    if (l + 1 < p.L) return;
    const T* w_out = p.W[l] + column;
    Vec<T> energy = {};
    for (i64 i = 0; i < NR<T>; i += LANES<T>) {
      energy += load(z + i) * load(w_out + i);
      store(z + i, load(w_out + i) * load(slope + i));
    }
    if (H) row_sums.set(r, column, energy);
  }
};

// The adjoint of delta. Factors of the weights' gradients are gathered over several evaluations and multiplied together, since
// adding to a matrix costs as much as a few dozen rows' products.
template <class P>
struct NetworkAdjoint : Network<P> {
  using T = typename P::Scalar;
  using Network<P>::p, Network<P>::crew, Network<P>::a, Network<P>::e, Network<P>::d, Network<P>::h, Network<P>::w,
      Network<P>::lds;
  static constexpr i64 GATHER = 96, PART = 8;  // rows that are multiplied together; whose sum is formed apart
  Layers<T> kept;                              // a_l and g_l of the evaluation, copied from the tape or computed again
  const Sums<T>* sums;
  i64 capacity, gathered = 0;               // evaluations
  T *left[MAX_LAYERS], *right[MAX_LAYERS];  // (e_{l+1}, r_{l+1}) and (zd_l, z_l), 2 rows for each evaluation and sample
  T *v, *curve[MAX_LAYERS];

  NetworkAdjoint(const Net<T>& p, const Crew& crew, i64 rows, Pieces<T>& pieces, const Sums<T>* sums)
      : Network<P>(p, crew, rows, pieces), sums(sums), capacity(sums && rows < GATHER ? GATHER / rows : 1) {
    v = pieces.take(rows * w);
    for (int l = 0; l < p.L; ++l) {
      const i64 n = rows * lds[l];
      curve[l] = pieces.take(n);
      kept.a[l] = pieces.take(n);
      kept.g[l] = l + 1 < p.L ? pieces.take(n) : nullptr;
      kept.stride[l] = lds[l];
      left[l] = pieces.take(l + 1 < p.L ? capacity * 2 * rows * lds[l + 1] : 0);
      right[l] = pieces.take(capacity * 2 * n);
    }
  }

  // Once, by one thread: what is read beyond a row's end must be finite.
  void clear_padding(i64 R) {
    clear(a, R * w);
    for (int l = 0; l < p.L; ++l) {
      clear(kept.a[l], R * lds[l]);
      if (kept.g[l]) clear(kept.g[l], R * lds[l]);
    }
  }

  // a_l, g_l and delta of an evaluation on the tape, in this thread's columns.
  void restore(const T* tape, i64 stride, i64 R) {
    if (p.L == 1) crew.meet();  // as in `run`
    const auto saved = Layers<T>::on(const_cast<T*>(tape), stride, p);
    for (int l = 0; l < p.L; ++l) {
      if (saved.a[l]) copy_own(crew, kept.a[l], lds[l], saved.a[l], stride, R, p.width[l]);
      if (saved.g[l]) copy_own(crew, kept.g[l], lds[l], saved.g[l], stride, R, p.width[l]);
    }
    if (!p.tape_layers) {
      copy_own(crew, a, w, kept.a[0], w, R, h);
      Layers<T> rest = kept;
      rest.a[0] = nullptr;
      return this->run(R, nullptr, 0, rest);
    }
    crew.template over_panels<T>(R, h, [&](i64 r, i64 column) {
      const i64 c = r * w + column;
      activate<T>(p.activation[0], kept.a[0] + c, e[0] + c, d[0] + c, NR<T>);
      const T* g = p.L > 1 ? kept.g[0] + c : p.W[0] + column;
      for (i64 j = 0; j < NR<T>; j += LANES<T>) store(e[0] + c + j, load(g + j) * load(d[0] + c + j));
    });
  }

  void flush(i64 R) {
    for (int l = 0; gathered && l + 1 < p.L; ++l)
      add_outer(crew, left[l], lds[l + 1], p.width[l + 1], right[l], lds[l], p.width[l], gathered * 2 * R, sums->W[l], lds[l]);
    gathered = 0;
  }

  // The place of z_l and zd_l, [R, ld] each, in what is gathered.
  T* zd(int l, i64 R) const { return right[l] + gathered * 2 * R * lds[l]; }
  T* z(int l, i64 R) const { return zd(l, R) + R * lds[l]; }

  // The first layer of the adjoint along v, in this thread's columns.
  void enter(i64 R) {
    crew.template over_panels<T>(R, h, [&](i64 r, i64 column) {
      const i64 c = r * w + column;
      activate<T>(p.activation[0], kept.a[0] + c, v + c, z(0, R) + c, d[0] + c, zd(0, R) + c, curve[0] + c, NR<T>);
    });
  }

  // nu = gradient of v . delta(a) + gE F(a) at what was restored, left in curve[0]; after `enter`. The parameters' goes to
  // `sums`, if it is to be gathered.
  void adjoint(const T* gE, i64 strideE, i64 R, bool gather) {
    const int last = p.L - 1;
    for (int l = 0; l < last; ++l) {
      crew.meet();
      product<P>(crew, zd(l, R), lds[l], R, p.width[l], p.by_WT[l], p.width[l + 1], this->converted,
                 [&](T* x, i64 r, i64 column) {
                   const i64 c = r * lds[l + 1] + column;
                   activate<T>(p.activation[l + 1], kept.a[l + 1] + c, x, z(l + 1, R) + c, d[l + 1] + c, zd(l + 1, R) + c,
                               curve[l + 1] + c, NR<T>);
                 });
    }
    // r_L replaces the curvature there; with one hidden layer it is the result. Sums over rows are formed before they are added
    // to those of other sub-steps: one number after the other would lose a digit.
    const T* w_out = p.W[last];
    const T *z_last = z(last, R), *zd_last = zd(last, R);
    crew.template over_columns<T>(p.width[last], [&](i64 i) {
      Vec<T> dw = {}, part = {};
      for (i64 r = 0; r < R; ++r) {
        if (r % PART == 0) dw += part, part = Vec<T>{};
        const i64 c = r * lds[last] + i;
        Vec<T> x = load(w_out + i) * load(curve[last] + c);
        part += load(zd_last + c);
        if (gE) {
          x += gE[r * strideE] * load(w_out + i) * load(d[last] + c);
          part += gE[r * strideE] * load(z_last + c);
        }
        store(curve[last] + c, x);
      }
      if (gather) store(sums->W[last] + i, load(sums->W[last] + i) + (dw + part));
    });
    if (gather && gE && crew.thread == 0) {
      T db = 0;
      for (i64 r = 0; r < R; ++r) db += gE[r * strideE];
      sums->b[last][0] += db;
    }
    for (int l = last - 1; l >= 0; --l) {
      const i64 from = lds[l + 1];
      T* r_next = curve[l + 1];
      if (gather) {
        T *e = left[l] + gathered * 2 * R * from, *r_row = e + R * from;
        crew.template over_columns<T>(p.width[l + 1], [&](i64 i) {
          Vec<T> db = {}, part = {};
          for (i64 r = 0; r < R; ++r) {
            if (r % PART == 0) db += part, part = Vec<T>{};
            const i64 c = r * from + i;
            store(e + c, load(l + 1 < last ? kept.g[l + 1] + c : w_out + i) * load(d[l + 1] + c));
            store(r_row + c, load(r_next + c));
            part += load(r_next + c);
          }
          store(sums->b[l] + i, load(sums->b[l] + i) + (db + part));
        });
      }
      crew.meet();
      product<P>(crew, r_next, from, R, p.width[l + 1], p.by_W[l], p.width[l], this->converted, [&](T* x, i64 r, i64 column) {
        for (i64 i = 0; i < NR<T>; i += LANES<T>) {
          const i64 c = r * lds[l] + column + i;
          store(curve[l] + c, load(x + i) * load(d[l] + c) + load(kept.g[l] + c) * load(curve[l] + c));
        }
      });
    }
  }
};

}  // namespace hjepa_fast::HJEPA_ISA
