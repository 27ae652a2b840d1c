// The loop of H = T(p) + V(q), a tile of rows by itself as in rows.h. The equations are in backends/separable_torch.py;
// at_q evaluates V and at_p evaluates T, unless T = (s p) . p / 2: then at_p.a is (s p) WV^T and is its own product.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// to += scale[row] x, for rows of n numbers
template <class T, class Scale>
HJEPA_INLINE void add_scaled(T* to, i64 ld_to, const T* x, i64 ld_x, i64 rows, i64 n, Scale scale) {
  for (i64 r = 0; r < rows; ++r) {
    const T c = scale(r);
    for (i64 i = 0; i < n; i += LANES<T>) store(to + r * ld_to + i, load(to + r * ld_to + i) + c * load(x + r * ld_x + i));
  }
}

// Where a term's evaluations are kept, in the order they are made in.
struct Slot {
  i64 next;
  bool again;  // whether slot next - 1 holds the present one, of an earlier call
  bool known = false;

  HJEPA_INLINE i64 take() {
    if (!again) return next++;
    again = false;
    return next - 1;
  }
  HJEPA_INLINE void pass() { known = again = false; }
};

// y [rows, columns] = x N, for x like `a` of the network and N packed
template <class P, class T>
HJEPA_INLINE void couple(const Network<P>& at, const T* x, i64 rows, const T* N, i64 columns, T* y) {
  const i64 w = ld<T>(columns);
  product<P>(at.crew, x, at.w, rows, at.h, N, columns, at.converted, [&](T* panel, i64 r, i64 column) {
    copy_rows(y + r * w + column, 0, panel, 0, 1, NR<T>);
  });
}

template <class P>
struct SeparableForward {
  using T = typename P::Scalar;
  const Separable<T>& p;
  Crew alone{nullptr, 0, 1};
  Network<P> at_q, at_p;
  i64 hV, hT, wV, wT;
  T *pushed, *moved;  // deltaV N and deltaT N^T
  T *sp, *sq, *value;

  SeparableForward(const Separable<T>& p, i64 rows, Pieces<T>& pieces)
      : p(p), at_q(p.V, alone, rows, pieces), at_p(p.T, alone, rows, pieces), hV(at_q.h), hT(at_p.h), wV(at_q.w), wT(at_p.w) {
    for (T** x : {&sp, &moved}) *x = pieces.take(rows * wV);
    for (T** x : {&sq, &pushed}) *x = pieces.take(rows * wT);
    value = pieces.take(rows);
    if (pieces.base) clear(sp, rows * wV), clear(sq, rows * wT), clear(at_q.a, rows * wV), clear(at_p.a, rows * wT);
  }

  void look(Network<P>& at, i64 row, i64 R, T* value, const T* N, i64 columns, T* carried, Slot& slot, i64 offset) {
    const i64 width = at.p.tape_width;
    T* tape = width ? p.tape + row * p.tape_width + offset + slot.take() * width : nullptr;
    at.run(R, value, 1, Layers<T>::on(tape, p.tape_width, at.p));
    slot.known = true;
    couple<P>(at, at.e[0], R, N, columns, carried);
  }

  void run(i64 row, i64 R) {
    Slot in_V{p.before_V, p.known_V}, in_T{p.before_T, p.known_T};
    copy_rows(at_q.a, wV, p.aV + row * hV, hV, R, hV);
    copy_rows(at_p.a, wT, p.aT + row * hT, hT, R, hT);
    copy_rows(sp, wV, p.sp + row * hV, hV, R, hV);
    copy_rows(sq, wT, p.sq + row * hT, hT, R, hT);
    const auto need_V = [&] {
      if (!in_V.known) look(at_q, row, R, p.with_energy ? value : nullptr, p.N_packed, hT, pushed, in_V, 0);
    };
    const auto need_T = [&] {
      if (in_T.known) return;
      if (!p.quadratic) return look(at_p, row, R, nullptr, p.NT_packed, hV, moved, in_T, p.offset_T);
      if (p.T.tape_width)
        copy_rows(p.tape + row * p.tape_width + p.offset_T + in_T.take() * hT, p.tape_width, at_p.a, wT, R, hT);
      in_T.known = true;
    };
    const auto note_energy = [&](i64 t) {
      need_V();
      for (i64 r = 0; r < R; ++r) p.energy[(row + r) * (p.n_steps + 1) + t] = value[r];
    };
    for (i64 t = p.begin; t < p.end; ++t) {
      if (p.with_energy) note_energy(t);
      for (int i = 0; i < p.n_moves; ++i) {
        const T kick = T(p.moves[2 * i]), drift = T(p.moves[2 * i + 1]);
        const auto times = [&](T c) { return [&, c](i64 r) { return c * p.dt[(row + r) * p.dt_stride + t]; }; };
        if (kick) need_V();
        if (drift) {
          need_T();
          add_scaled(at_q.a, wV, p.quadratic ? at_p.a : moved, wV, R, hV, times(drift));
          add_scaled(sq, wT, p.quadratic ? sp : at_p.e[0], wT, R, hT, times(drift));
          in_V.pass();
        }
        if (kick) {
          add_scaled(at_p.a, wT, pushed, wT, R, hT, times(-kick));
          add_scaled(sp, wV, at_q.e[0], wV, R, hV, times(-kick));
          in_T.pass();
        }
      }
      if (p.sps) copy_rows(p.sps + (row * p.n_steps + t) * hV, p.n_steps * hV, sp, wV, R, hV);
      if (p.sqs) copy_rows(p.sqs + (row * p.n_steps + t) * hT, p.n_steps * hT, sq, wT, R, hT);
      if (p.aTs) copy_rows(p.aTs + (row * p.n_steps + t) * hT, p.n_steps * hT, at_p.a, wT, R, hT);
    }
    if (p.with_energy && p.last && p.end == p.n_steps) note_energy(p.n_steps);
    copy_rows(p.aV + row * hV, hV, at_q.a, wV, R, hV);
    copy_rows(p.aT + row * hT, hT, at_p.a, wT, R, hT);
    copy_rows(p.sp + row * hV, hV, sp, wV, R, hV);
    copy_rows(p.sq + row * hT, hT, sq, wT, R, hT);
  }
};

// A term on the way back: the cotangent l of its first pre-activation, and what is pending on its gradient in v and `carried`.
template <class P>
struct Side : NetworkAdjoint<P> {
  using T = typename P::Scalar;
  using NetworkAdjoint<P>::h, NetworkAdjoint<P>::w, NetworkAdjoint<P>::v, NetworkAdjoint<P>::e;
  i64 other, w_other;
  const T* N;  // packed: takes l to the cotangent of the other term's delta
  T *l, *lN, *u;
  T* carried;  // pending on delta's product with N
  i64 next;    // evaluations not passed yet
  bool here = false, used = false, lN_known = false;
  const T* gE = nullptr;

  Side(const Problem<T>& p, const Crew& crew, i64 rows, Pieces<T>& pieces, const Sums<T>* sums, i64 other, const T* N, i64 next)
      : NetworkAdjoint<P>(p, crew, rows, pieces, sums), other(other), w_other(ld<T>(other)), N(N), next(next) {
    for (T** x : {&l, &u}) *x = pieces.take(rows * w);
    for (T** x : {&lN, &carried}) *x = pieces.take(rows * w_other);
    if (!pieces.base) return;
    clear(l, rows * w), clear(u, rows * w), clear(carried, rows * w_other);
    this->clear_padding(rows);
  }

  void need_lN(i64 R) {
    if (!lN_known) couple<P>(*this, l, R, N, other, lN);
    lN_known = true;
  }

  // the last evaluation not passed yet, unless that is the present one
  void arrive(const T* tape, i64 stride, i64 R, bool network) {
    if (here) return;
    const T* from = tape + --next * this->p.tape_width;
    here = true, used = false, gE = nullptr;
    if (!network) return copy_rows(this->a, w, from, stride, R, h);
    this->restore(from, stride, R);
    clear(v, R * w);
    clear(carried, R * w_other);
  }

  // c dt times delta was added to a sum whose cotangent is `sum`, and c dt delta N, N being the other side's, to what has the
  // cotangent l_other; lN_other is the other side's lN
  template <class Scale>
  void use(T c, const T* sum, const T* lN_other, const T* l_other, i64 R, Scale dt, T* gdt, i64 stride_gdt) {
    for (i64 r = 0; r < R; ++r) {
      const T step = dt(r);
      for (i64 i = r * w; i < r * w + h; i += LANES<T>) {
        const Vec<T> x = c * (load(sum + i) + load(lN_other + i));
        store(u + i, x);
        store(v + i, load(v + i) + step * x);
      }
      gdt[r * stride_gdt] += dot(u + r * w, e[0] + r * w, h);
    }
    add_scaled(carried, w_other, l_other, w_other, R, other, [&](i64 r) { return c * dt(r); });
    used = true;
  }

  // Adds what is pending: one Hessian-vector product for all that shared this gradient. Whether the gradient was used.
  bool leave(i64 strideE, i64 R) {
    const bool was_used = here && used;
    if (was_used || (here && gE)) {
      this->enter(R);
      this->adjoint(gE, strideE, R, this->sums != nullptr);
      if (this->sums && ++this->gathered == this->capacity) this->flush(R);
      add_scaled(l, w, this->curve[0], w, R, h, [](i64) { return T(1); });
      lN_known = false;
    }
    here = false;
    return was_used;
  }
};

template <class P>
struct SeparableBackward {
  using T = typename P::Scalar;
  const Separable<T>& p;
  const SeparableSums<T>* sums;
  Crew alone{nullptr, 0, 1};
  i64 hV, hT, wV, wT;
  Side<P> q, k;  // of V, and of T
  T *lsp, *lsq, *sp;
  T *leftN, *rightN;
  i64 capacity, gathered = 0;  // rows of factors of N's gradient

  SeparableBackward(const Separable<T>& p, i64 rows, Pieces<T>& pieces, const SeparableSums<T>* sums)
      : p(p), sums(sums), hV(p.V.width[0]), hT(p.T.width[0]), wV(ld<T>(hV)), wT(ld<T>(hT)),
        q(p.V, alone, rows, pieces, sums && sums->need_V ? &sums->V : nullptr, hT, p.N_packed, p.before_V),
        k(p.T, alone, rows, pieces, sums && sums->need_T ? &sums->T : nullptr, hV, p.NT_packed, p.before_T),
        capacity(2 * NetworkAdjoint<P>::GATHER > rows ? 2 * NetworkAdjoint<P>::GATHER : rows) {
    for (T** x : {&lsp, &sp}) *x = pieces.take(rows * wV);
    lsq = pieces.take(rows * wT);
    leftN = pieces.take(sums ? capacity * wV : 0);
    rightN = pieces.take(sums ? capacity * wT : 0);
    if (pieces.base) clear(lsp, rows * wV), clear(sp, rows * wV), clear(lsq, rows * wT);
  }

  void flush_N() {
    if (gathered) add_outer(alone, leftN, wV, hV, rightN, wT, hT, gathered, sums->N, wT);
    gathered = 0;
  }

  void gather_N(const T* left, const T* right, i64 R) {
    if (!sums) return;
    if (gathered + R > capacity) flush_N();
    copy_rows(leftN + gathered * wV, wV, left, wV, R, hV);
    copy_rows(rightN + gathered * wT, wT, right, wT, R, wT);
    gathered += R;
  }

  void leave_q(i64 R) {
    if (q.leave(p.n_steps + 1, R)) gather_N(q.e[0], q.carried, R);
  }
  void leave_k(i64 R) {
    if (k.leave(0, R)) gather_N(k.carried, k.e[0], R);
  }

  void run(i64 row, i64 R) {
    T *lV = q.l, *lT = k.l;
    copy_rows(lV, wV, p.aV + row * hV, hV, R, hV);
    copy_rows(lT, wT, p.aT + row * hT, hT, R, hT);
    copy_rows(lsp, wV, p.sp + row * hV, hV, R, hV);
    copy_rows(lsq, wT, p.sq + row * hT, hT, R, hT);
    copy_rows(sp, wV, p.value_of_sp + row * hV, hV, R, hV);
    const T *tape_V = p.tape + row * p.tape_width, *tape_T = tape_V + p.offset_T;
    const auto energy_at = [&](i64 t) {
      if (!p.with_energy) return;
      q.arrive(tape_V, p.tape_width, R, true);
      q.gE = p.gE ? p.gE + row * (p.n_steps + 1) + t : nullptr;
    };
    if (p.last && p.end == p.n_steps) energy_at(p.n_steps);
    for (i64 t = p.end - 1; t >= p.begin; --t) {
      const i64 at = row * p.n_steps + t;
      const auto add_given = [&](T* l, i64 w, const T* given, i64 h) {
        for (i64 r = 0; given && r < R; ++r)
          for (i64 c = 0; c < h; ++c) l[r * w + c] += given[(at + r * p.n_steps) * h + c];
      };
      add_given(lsp, wV, p.gsp, hV);
      add_given(lsq, wT, p.gsq, hT);
      add_given(lT, wT, p.gaT, hT);
      if (p.gaT) k.lN_known = false;
      T* gdt = p.gdt + at;
      for (i64 r = 0; r < R; ++r) gdt[r * p.n_steps] = 0;
      const auto dt = [&](i64 r) { return p.dt[(row + r) * p.dt_stride + t]; };
      for (int i = p.n_moves - 1; i >= 0; --i) {
        const T kick = T(p.moves[2 * i]), drift = T(p.moves[2 * i + 1]);
        // each changed what the other reads; its cotangent must be complete before it is passed on
        if (drift) leave_q(R);
        if (kick) leave_k(R);
        if (kick) k.need_lN(R);
        if (drift) {
          if (!p.quadratic) q.need_lN(R);
          k.arrive(tape_T, p.tape_width, R, !p.quadratic);
          if (!p.quadratic) k.use(drift, lsq, q.lN, lV, R, dt, gdt, p.n_steps);
        }
        if (kick) {
          q.arrive(tape_V, p.tape_width, R, true);
          q.use(-kick, lsp, k.lN, lT, R, dt, gdt, p.n_steps);
          add_scaled(sp, wV, q.e[0], wV, R, hV, [&](i64 r) { return kick * dt(r); });
        }
        if (drift && p.quadratic) {
          for (i64 r = 0; r < R; ++r)
            gdt[r * p.n_steps] +=
                drift * (dot(lV + r * wV, k.a + r * wV, hV) + dot(lsq + r * wV, sp + r * wV, hV));
          add_scaled(lT, wT, lV, wV, R, hV, [&](i64 r) { return drift * dt(r); });
          add_scaled(lsp, wV, lsq, wT, R, hV, [&](i64 r) { return drift * dt(r); });
          k.lN_known = false;
        }
      }
      energy_at(t);
    }
    leave_q(R);
    leave_k(R);
    q.flush(R);
    k.flush(R);
    flush_N();
    copy_rows(p.aV + row * hV, hV, lV, wV, R, hV);
    copy_rows(p.aT + row * hT, hT, lT, wT, R, hT);
    copy_rows(p.sp + row * hV, hV, lsp, wV, R, hV);
    copy_rows(p.sq + row * hT, hT, lsq, wT, R, hT);
    copy_rows(p.value_of_sp + row * hV, hV, sp, wV, R, hV);
  }
};

template <class P, class T>
i64 separable_forward_scratch(const Separable<T>& p, i64 rows) {
  Pieces<T> pieces{nullptr};
  SeparableForward<P> tile(p, rows, pieces);
  return pieces.used;
}

template <class P, class T>
void separable_forward(const Separable<T>& p, i64 row, i64 rows, T* scratch) {
  HJEPA_ALLOW(scratch, (separable_forward_scratch<P>(p, rows) * sizeof(T)));  // as in rows.h
  Pieces<T> pieces{scratch};
  SeparableForward<P>(p, rows, pieces).run(row, rows);
}

template <class P, class T>
i64 separable_backward_scratch(const Separable<T>& p, i64 rows, const SeparableSums<T>* sums) {
  Pieces<T> pieces{nullptr};
  SeparableBackward<P> tile(p, rows, pieces, sums);
  return pieces.used;
}

template <class P, class T>
void separable_backward(const Separable<T>& p, i64 row, i64 last, i64 rows, T* scratch, const SeparableSums<T>* sums) {
  const i64 tiles = (last - row + rows - 1) / rows, n = last - row;
  for (i64 i = 0; i < tiles; ++i) {
    const i64 from = row + n * i / tiles, to = row + n * (i + 1) / tiles;
    Pieces<T> pieces{scratch};
    SeparableBackward<P>(p, rows, pieces, sums).run(from, to - from);
  }
}

}  // namespace hjepa_fast::HJEPA_ISA
