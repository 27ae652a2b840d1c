// A rollout as a program (hjepa_fast/hidden_space/program.py), for a tile of rows: registers are rows of numbers, padded like a
// network's layers; a thread has a tile to itself, or a crew shares it and each thread has its columns of every register.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// y += c_r x M for each row r, in this thread's columns; c(r) is that row's factor.
template <class P, class T, class Scale>
HJEPA_INLINE void add_times(const Crew& crew, const Program<T>& p, const Line& x, T* const* value, i64 R, T* converted,
                            Scale c) {
  const i64 from = p.width[x.x], to = p.width[x.y], ldx = ld<T>(from), ldy = ld<T>(to);
  const T* source = value[x.x];
  T* target = value[x.y];
  if (x.matrix < 0 || p.matrix[x.matrix].diagonal) {
    const T* diagonal = x.matrix < 0 ? nullptr : p.matrix[x.matrix].diagonal;
    crew.template over_own<T>(R, to, [&](i64 r, i64 i) {
      Vec<T> moved = c(r) * load(source + r * ldx + i);
      if (diagonal) moved *= load(diagonal + i);
      store(target + r * ldy + i, load(target + r * ldy + i) + moved);
    });
    return;
  }
  const Matrix<T>& M = p.matrix[x.matrix];
  product<P>(crew, source, ldx, R, from, x.transposed ? M.transposed : M.straight, to, converted,
             [&](T* panel, i64 r, i64 column) {
               T* y = target + r * ldy + column;
               const T factor = c(r);
               for (i64 j = 0; j < NR<T>; j += LANES<T>) store(y + j, load(y + j) + factor * load(panel + j));
             });
}

template <class T>
HJEPA_INLINE void clear_own(const Crew& crew, T* x, i64 R, i64 width) {
  const i64 w = ld<T>(width);
  crew.template over_own<T>(R, width, [&](i64 r, i64 c) { store(x + r * w + c, Vec<T>{}); });
}

// y <- e, or y <- e x with x: e the external numbers of step t. They are read as they lie, not in vectors: their rows may end anywhere.
template <class T>
HJEPA_INLINE void take_external(const Crew& crew, const Program<T>& p, const Line& x, T* const* value, i64 row, i64 R, i64 t) {
  const Rows<const T>& e = p.external[x.item];
  const i64 n = p.width[x.y], w = ld<T>(n);
  i64 first, last;
  crew.template columns<T>(n, first, last);
  if (last > n) last = n;
  const T* source = x.op == SCALE ? value[x.x] : nullptr;
  for (i64 r = 0; r < R; ++r) {
    const T* from = e.at + (row + r) * e.stride + t * e.step;
    T* to = value[x.y] + r * w;
    for (i64 c = first; c < last; ++c) to[c] = source ? from[c] * source[r * w + c] : from[c];
  }
}

template <class T>
i64 widest_register(const Program<T>& p) {
  i64 widest = ld<T>(p.z0.stride);
  for (int i = 0; i < p.n_registers; ++i) widest = ld<T>(p.width[i]) > widest ? ld<T>(p.width[i]) : widest;
  return widest;
}

// As many networks as a program has, made in place: they have no default.
template <class N>
struct InPlace {
  alignas(N) unsigned char room[MAX_NETWORKS][sizeof(N)];
  N& operator[](int i) { return *reinterpret_cast<N*>(room[i]); }
};

struct Place {};

}  // namespace hjepa_fast::HJEPA_ISA

inline void* operator new(decltype(sizeof(0)), void* at, hjepa_fast::HJEPA_ISA::Place) noexcept { return at; }

namespace hjepa_fast::HJEPA_ISA {

template <class P>
struct ProgramForward {
  using T = typename P::Scalar;
  const Program<T>& p;
  Crew& crew;
  InPlace<Network<P>> at;
  T *value[MAX_REGISTERS] = {}, *energy, *converted;

  ProgramForward(const Program<T>& p, Crew& crew, i64 rows, Pieces<T>& pieces) : p(p), crew(crew) {
    for (int n = 0; n < p.n_networks; ++n) {
      Network<P>* network = new (at.room[n], Place{}) Network<P>(p.network[n], crew, rows, pieces);
      value[p.reg_a[n]] = network->a;
      value[p.reg_d[n]] = network->e[0];
    }
    for (int i = 0; i < p.n_registers; ++i)
      if (!value[i]) value[i] = pieces.take(rows * ld<T>(p.width[i]));
    energy = pieces.take(rows);
    const i64 widest = P::DEPTH > 1 ? widest_register(p) : 0;
    converted = pieces.take(crew.all * rows * widest) + crew.thread * rows * widest;
  }

  void execute(const Code& code, i64 row, i64 R, i64 t, T* tape, i64 stride) {
    const i64 at_dt = t < p.n_steps ? t : p.n_steps - 1;
    for (const Line* x = code.at; x != code.at + code.n; ++x) {
      if (x->meet) crew.meet();
      if (x->op == EVALUATE) {
        const Item& item = p.item[x->item];
        T* to = tape && item.width ? tape + item.offset + (item.before(t) + x->slot) * item.width : nullptr;
        const bool wanted = p.energy && x->energy >= 0;
        const auto keep = to ? Layers<T>::on(to, stride, p.network[x->item]) : Layers<T>{};
        at[x->item].run(R, wanted ? energy : nullptr, 1, keep);
        for (i64 r = crew.first(R); wanted && r < crew.last(R); ++r)
          p.energy[(row + r) * (p.n_steps + 1) + t + x->energy] += energy[r];
      } else if (x->op == ADD) {
        const T c = T(x->c);
        const T* dt = p.dt + row * p.dt_stride + at_dt;
        add_times<P>(crew, p, *x, value, R, converted, [&](i64 r) { return x->scaled ? c * dt[r * p.dt_stride] : c; });
      } else if (x->op == CLEAR) {
        clear_own(crew, value[x->y], R, p.width[x->y]);
      } else if (x->op == KEEP && tape) {
        const Item& item = p.item[x->item];
        copy_own(crew, tape + item.offset + (item.before(t) + x->slot) * item.width, stride, value[x->x], ld<T>(item.width), R,
                 item.width);
      } else if (x->op == TAKE || x->op == SCALE) {
        take_external(crew, p, *x, value, row, R, t);
      }
    }
  }

  // What `state[i]` starts from. By the first thread, alone.
  void load(int i, i64 row, i64 R) {
    const i64 n = p.width[p.state[i]], w = ld<T>(n);
    const Origin& from = p.origin[i];
    T* to = value[p.state[i]];
    const T* z = p.z0.at + row * p.z0.stride + from.from;
    if (p.in[i].at) {
      copy_rows(to, w, p.in[i].at + row * p.in[i].stride, p.in[i].stride, R, n);
    } else if (from.kind == Origin::COLUMNS) {
      copy_rows(to, w, z, p.z0.stride, R, n);
    } else if (from.kind == Origin::UNIT) {
      for (i64 r = 0; r < R; ++r) to[r * w + from.from] = 1;
    } else if (from.kind == Origin::LAYER) {
      const T* b = p.first_b[from.network];
      product<P>(crew, z, p.z0.stride, R, p.inner[from.network], p.first_WT[from.network], n, converted,
                 [&](T* x, i64 r, i64 column) {
                   for (i64 j = 0; j < NR<T>; j += LANES<T>)
                     store(to + r * w + column + j,
                           hjepa_fast::HJEPA_ISA::load(x + j) + hjepa_fast::HJEPA_ISA::load(b + column + j));
                 });
    }
  }

  // Steps begin..end-1 of rows `row` and on; the tape of the first of these, its rows `stride` apart, or null.
  void run(i64 row, i64 R, T* tape, i64 stride) {
    if (crew.thread == 0) {
      for (int i = 0; i < p.n_registers; ++i) clear(value[i], R * ld<T>(p.width[i]));
      for (int i = 0; i < p.n_state; ++i) load(i, row, R);
      if (p.begin) execute(p.start, row, R, p.begin, tape, stride);
    }
    const auto emit = [&](i64 slot) {
      for (int i = 0; i < p.n_path; ++i) {
        const i64 n = p.width[p.path[i]];
        const Rows<T>& to = p.emit[i];
        if (to.at) copy_own(crew, to.at + row * to.stride + slot * to.step, to.stride, value[p.path[i]], ld<T>(n), R, n);
      }
    };
    int counted;
    const i64 joined = crew.start(counted);
    if (p.emit_start && p.every && p.begin == 0 && crew.thread == 0) emit(0);
    for (i64 t = p.begin + joined; t < p.end; ++t) {
      if (crew.may_let_in(t - p.begin)) crew.let_in(t - p.begin, 0);
      execute(p.code(t), row, R, t, tape, stride);
      const bool ends = t + 1 == p.end;
      if (t + 1 == p.n_steps) {
        crew.meet();
        execute(p.last, row, R, p.n_steps, tape, stride);
      }
      if (p.every) {
        emit(t + p.emit_start);
      } else if (t + 1 == p.n_steps) {
        emit(0);
      }
      for (int i = 0; ends && i < p.n_state; ++i) {
        const i64 n = p.width[p.state[i]];
        if (p.out[i].at)
          copy_own(crew, p.out[i].at + row * p.out[i].stride, p.out[i].stride, value[p.state[i]], ld<T>(n), R, n);
      }
      if (crew.leaves(t - p.begin)) return;
    }
    crew.end(p.end - p.begin);
  }
};

// Factors of a matrix's gradient, of the moves made with it: gathered, then multiplied together.
template <class T>
struct Factors {
  T *left, *right;
  i64 capacity, rows;
};

template <class P>
struct ProgramBackward {
  using T = typename P::Scalar;
  static constexpr i64 GATHER = 192;  // rows that are multiplied together
  const Program<T>& p;
  Crew& crew;
  const ProgramSums<T>* sums;
  InPlace<NetworkAdjoint<P>> at;
  T *value[MAX_REGISTERS] = {}, *given[MAX_REGISTERS] = {}, *converted, *c_of;
  Factors<T> factors[MAX_MATRICES] = {};
  // products of a cotangent and what it is of, for dt: apart for each width, whose columns are divided alike
  int n_widths = 0;
  i64 widths[MAX_REGISTERS];
  RowSums<T> of_dt[MAX_REGISTERS];
  i64 loaded[MAX_ITEMS];

  ProgramBackward(const Program<T>& p, Crew& crew, i64 rows, Pieces<T>& pieces, const ProgramSums<T>* sums)
      : p(p), crew(crew), sums(sums) {
    for (int n = 0; n < p.n_networks; ++n) {
      auto* network =
          new (at.room[n], Place{}) NetworkAdjoint<P>(p.network[n], crew, rows, pieces, sums ? &sums->network[n] : nullptr);
      value[p.reg_a[n]] = network->a;
      value[p.reg_d[n]] = network->e[0];
      given[p.reg_d[n]] = network->v;
    }
    for (int i = 0; i < p.n_registers; ++i) {
      if (!value[i]) value[i] = pieces.take(rows * ld<T>(p.width[i]));
      if (!given[i]) given[i] = pieces.take(rows * ld<T>(p.width[i]));
      if (class_of(p.width[i]) == n_widths) widths[n_widths++] = p.width[i];
    }
    for (int i = 0; i < n_widths; ++i) of_dt[i] = RowSums<T>(rows, widths[i], pieces);
    const i64 widest = P::DEPTH > 1 ? widest_register(p) : 0;
    converted = pieces.take(crew.all * rows * widest) + crew.thread * rows * widest;
    c_of = pieces.take(crew.all * rows) + crew.thread * rows;
    for (int m = 0; sums && m < p.n_matrices; ++m) {
      const Matrix<T>& M = p.matrix[m];
      if (M.diagonal) continue;
      factors[m].capacity = rows > GATHER ? rows : GATHER / rows * rows;
      factors[m].left = pieces.take(factors[m].capacity * ld<T>(M.n));
      factors[m].right = pieces.take(factors[m].capacity * ld<T>(M.m));
    }
  }

  int class_of(i64 width) const {
    int i = 0;
    while (i < n_widths && widths[i] != width) ++i;
    return i;
  }

  void flush(int m) {
    Factors<T>& f = factors[m];
    if (!f.rows) return;
    const Matrix<T>& M = p.matrix[m];
    crew.meet();
    add_outer(crew, f.left, ld<T>(M.n), M.n, f.right, ld<T>(M.m), M.m, f.rows, sums->matrix[m], ld<T>(M.m));
    f.rows = 0;
    crew.meet();
  }

  void flush_network(int n, i64 R) {
    crew.meet();
    at[n].flush(R);
    crew.meet();
  }

  // Rows of factors that a line adds; the same whether it is run or only counted, by who comes in later.
  template <bool RUN>
  void gather(const Line& x, i64 R, const T* scaled) {
    Factors<T>& f = factors[x.matrix];
    if (f.rows + R > f.capacity) {
      if constexpr (RUN) flush(x.matrix);
      f.rows = 0;
    }
    if constexpr (RUN) {
      const i64 n = p.width[x.x], m = p.width[x.y];
      // y += x M wants x^T y, y += x M^T wants y^T x
      T* of_x = x.transposed ? f.right + f.rows * ld<T>(n) : f.left + f.rows * ld<T>(n);
      T* of_y = x.transposed ? f.left + f.rows * ld<T>(m) : f.right + f.rows * ld<T>(m);
      const T *from_x = value[x.x], *from_y = given[x.y];
      crew.template over_own<T>(R, n, [&](i64 r, i64 c) { store(of_x + r * ld<T>(n) + c, load(from_x + r * ld<T>(n) + c)); });
      crew.template over_own<T>(R, m, [&](i64 r, i64 c) {
        store(of_y + r * ld<T>(m) + c, scaled[r] * load(from_y + r * ld<T>(m) + c));
      });
    }
    f.rows += R;
  }

  void restore(const Line& x, i64 R, i64 t, const T* tape, i64 stride) {
    const Item& item = p.item[x.item];
    const i64 slot = item.before(t) + x.slot;
    if (loaded[x.item] == slot) return;
    loaded[x.item] = slot;
    at[x.item].restore(tape + item.offset + slot * item.width, stride, R);
  }

  void execute(const Code& code, i64 row, i64 R, i64 t, const T* tape, i64 stride) {
    const i64 at_dt = t < p.n_steps ? t : p.n_steps - 1;
    for (const Line* x = code.at; x != code.at + code.n; ++x) {
      if (x->meet) crew.meet();
      for (i64 r = 0; (x->op == ADD || x->op == ADJOINT) && r < R; ++r)
        c_of[r] = x->scaled ? T(x->c) * p.dt[(row + r) * p.dt_stride + at_dt] : T(x->c);
      switch (x->op) {
        case RESTORE: restore(*x, R, t, tape, stride); break;
        case HESSIAN: {
          NetworkAdjoint<P>& network = at[x->item];
          restore(*x, R, t, tape, stride);
          network.enter(R);
          network.adjoint(p.gE && x->energy >= 0 ? p.gE + row * (p.n_steps + 1) + t + x->energy : nullptr, p.n_steps + 1, R,
                          sums != nullptr);
          const i64 h = network.h, w = network.w;
          T *la = given[x->x], *v = given[x->y];
          crew.template over_own<T>(R, h, [&](i64 r, i64 c) {
            store(la + r * w + c, load(la + r * w + c) + load(network.curve[0] + r * w + c));
            store(v + r * w + c, Vec<T>{});
          });
          if (sums && ++network.gathered == network.capacity) flush_network(x->item, R);
          break;
        }
        case ADD: add_times<P>(crew, p, *x, value, R, converted, [&](i64 r) { return c_of[r]; }); break;
        case CLEAR: clear_own(crew, value[x->y], R, p.width[x->y]); break;
        case FORGET: clear_own(crew, given[x->y], R, p.width[x->y]); break;
        case LOAD: {
          const Item& item = p.item[x->item];
          copy_own(crew, value[x->x], ld<T>(item.width), tape + item.offset + (item.before(t) + x->slot) * item.width, stride,
                   R, item.width);
          break;
        }
        case ADJOINT: adjoint(*x, R, c_of); break;
        case TAKE:
        case SCALE: take_external(crew, p, *x, value, row, R, t); break;
        case GIVE:
        case UNSCALE: give_external(*x, row, R, t); break;
      }
    }
  }

  // The adjoint of `take_external`, which leaves no cotangent of y.
  void give_external(const Line& x, i64 row, i64 R, i64 t) {
    const Rows<const T>& e = p.external[x.item];
    const Rows<T>& to = p.of_external[x.item];
    const i64 n = p.width[x.y], w = ld<T>(n);
    i64 first, last;
    crew.template columns<T>(n, first, last);
    if (last > n) last = n;
    for (i64 r = 0; r < R; ++r) {
      const T* from = e.at + (row + r) * e.stride + t * e.step;
      T* total = to.at + (row + r) * to.stride + t * to.step;
      T* ly = given[x.y] + r * w;
      for (i64 c = first; c < last; ++c) {
        const T g = ly[c];
        total[c] += x.op == GIVE ? g : g * value[x.x][r * w + c];
        if (x.op == UNSCALE) given[x.x][r * w + c] += g * from[c];
        ly[c] = 0;
      }
    }
  }

  void adjoint(const Line& x, i64 R, const T* c_of) {
    const i64 n = p.width[x.x], m = p.width[x.y], ldx = ld<T>(n), ldy = ld<T>(m);
    const T *at_x = value[x.x], *ly = given[x.y];
    T* lx = given[x.x];
    const RowSums<T>& dots = of_dt[class_of(n)];
    const T c = T(x.c);
    const auto pass = [&](const T* back, i64 r, i64 column) {
      const i64 i = r * ldx + column;
      Vec<T> d = {};
      for (i64 j = 0; j < NR<T>; j += LANES<T>) {
        store(lx + i + j, load(lx + i + j) + c_of[r] * load(back + j));
        d += load(at_x + i + j) * load(back + j);
      }
      if (x.scaled) dots.at[r * dots.stride + column / NR<T>] += c * sum<T>(d);
    };
    const Matrix<T>* M = x.matrix < 0 ? nullptr : &p.matrix[x.matrix];
    if (!M) {
      crew.template over_panels<T>(R, n, [&](i64 r, i64 column) { pass(ly + r * ldy + column, r, column); });
    } else if (M->diagonal) {
      alignas(HJEPA_VECTOR_BYTES) T back[NR<T>];
      crew.template over_panels<T>(R, n, [&](i64 r, i64 column) {
        for (i64 j = 0; j < NR<T>; j += LANES<T>)
          store(back + j, load(M->diagonal + column + j) * load(ly + r * ldy + column + j));
        pass(back, r, column);
      });
      if (sums)
        crew.template over_columns<T>(n, [&](i64 i) {
          Vec<T> s = {};
          for (i64 r = 0; r < R; ++r) s += c_of[r] * load(at_x + r * ldx + i) * load(ly + r * ldy + i);
          store(sums->matrix[x.matrix] + i, load(sums->matrix[x.matrix] + i) + s);
        });
    } else {
      if (sums) gather<true>(x, R, c_of);
      product<P>(crew, ly, ldy, R, m, x.transposed ? M->straight : M->transposed, n, converted, pass);
    }
  }

  // What has been gathered when `done` steps are.
  void count(i64 done, i64 R) {
    const auto pass = [&](const Code& code) {
      for (const Line* x = code.at; x != code.at + code.n; ++x) {
        if (x->op == HESSIAN && ++at[x->item].gathered == at[x->item].capacity) at[x->item].gathered = 0;
        if (x->op == ADJOINT && x->matrix >= 0 && !p.matrix[x->matrix].diagonal) gather<false>(*x, R, nullptr);
      }
    };
    for (i64 i = 0; i < done; ++i) {
      if (i == 0 && p.end == p.n_steps) pass(p.back_last);
      pass(p.back_code(p.end - 1 - i));
    }
  }

  void take(const Rows<T>* from, const int* which, int n_from, T** to, i64 row, i64 R) {
    for (int i = 0; i < n_from; ++i) {
      const i64 n = p.width[which[i]];
      if (from[i].at) copy_rows(to[which[i]], ld<T>(n), from[i].at + row * from[i].stride, from[i].stride, R, n);
    }
  }

  void give(const Rows<T>* to, const int* which, int n_to, T** from, i64 row, i64 R) {
    for (int i = 0; i < n_to; ++i) {
      const i64 n = p.width[which[i]];
      if (to[i].at) copy_own(crew, to[i].at + row * to[i].stride, to[i].stride, from[which[i]], ld<T>(n), R, n);
    }
  }

  void run(i64 row, i64 R, const T* tape, i64 stride) {
    if (crew.thread == 0) {
      for (int n = 0; n < p.n_networks; ++n) at[n].clear_padding(R);
      for (int i = 0; i < p.n_registers; ++i) {
        clear(value[i], R * ld<T>(p.width[i]));
        clear(given[i], R * ld<T>(p.width[i]));
      }
      take(p.cotangent, p.state, p.n_state, given, row, R);
      take(p.cotangent + p.n_state, p.known, p.n_known, given, row, R);
      take(p.value, p.state, p.n_state, value, row, R);
    }
    for (i64& slot : loaded) slot = -1;
    const i64 n = p.end - p.begin;
    int counted;
    i64 done = crew.start(counted);
    if (sums) count(done, R);
    for (; done < n; ++done) {
      if (crew.may_let_in(done)) crew.let_in(done, 0);
      const i64 t = p.end - 1 - done;
      if (crew.all > 1)
        for (i64& slot : loaded) slot = -1;
      if (t + 1 == p.n_steps) {
        execute(p.back_last, row, R, p.n_steps, tape, stride);
        crew.meet();
      }
      for (int i = 0; i < p.n_path; ++i)
        if (p.g_path[i].at && (p.every || t + 1 == p.n_steps)) add_own(p.g_path[i], p.path[i], p.every ? t : 0, row, R);
      for (int i = 0; i < n_widths; ++i)
        crew.template over_panels<T>(R, widths[i], [&](i64 r, i64 c) { of_dt[i].at[r * of_dt[i].stride + c / NR<T>] = 0; });
      // what the path's cotangents were added to is read whole
      crew.meet();
      execute(p.back_code(t), row, R, t, tape, stride);
      if (done + 1 == n) {
        for (int m = 0; sums && m < p.n_matrices; ++m) flush(m);
        for (int i = 0; sums && i < p.n_networks; ++i) flush_network(i, R);
        give(p.cotangent, p.state, p.n_state, given, row, R);
        give(p.cotangent + p.n_state, p.known, p.n_known, given, row, R);
        give(p.value, p.state, p.n_state, value, row, R);
      }
      crew.meet();
      for (i64 r = crew.first(R); r < crew.last(R); ++r) {
        T s = 0;
        for (int i = 0; i < n_widths; ++i) s += of_dt[i].total(r, widths[i]);
        p.gdt[(row + r) * p.n_steps + t] = s;
      }
      if (crew.leaves(done)) return;
    }
    crew.end(n);
  }

  void add_own(const Rows<const T>& g, int reg, i64 t, i64 row, i64 R) {
    i64 first, last;
    crew.template columns<T>(p.width[reg], first, last);
    if (last > p.width[reg]) last = p.width[reg];
    for (i64 r = 0; r < R; ++r) {
      const T* from = g.at + (row + r) * g.stride + t * g.step;
      T* to = given[reg] + r * ld<T>(p.width[reg]);
      for (i64 c = first; c < last; ++c) to[c] += from[c];
    }
  }
};

template <class P, class T>
i64 program_forward_scratch(const Program<T>& p, i64 rows, int crew_size) {
  Pieces<T> pieces{nullptr};
  Crew crew{nullptr, 0, crew_size};
  ProgramForward<P> tile(p, crew, rows, pieces);
  return pieces.used;
}

template <class P, class T>
void program_forward(const Program<T>& p, i64 row, i64 rows, int thread, int crew_size, Barrier* barrier, T* scratch) {
  HJEPA_ALLOW(scratch, (program_forward_scratch<P>(p, rows, crew_size) * sizeof(T)));  // as in rows.h
  Pieces<T> pieces{scratch};
  Crew crew{barrier, thread, crew_size};
  ProgramForward<P>(p, crew, rows, pieces).run(row, rows, p.tape ? p.tape + row * p.tape_width : nullptr, p.tape_width);
}

template <class P, class T>
i64 program_backward_scratch(const Program<T>& p, i64 rows, bool with_sums, int crew_size) {
  Pieces<T> pieces{nullptr};
  const ProgramSums<T> any{};
  Crew crew{nullptr, 0, crew_size};
  ProgramBackward<P> tile(p, crew, rows, pieces, with_sums ? &any : nullptr);
  if (p.again) {
    pieces.take(rows * p.tape_width);
    ProgramForward<P> forward(p, crew, rows, pieces);
  }
  return pieces.used;
}

template <class P, class T>
void program_backward(const Program<T>& p, i64 row, i64 last, i64 rows, int thread, int crew_size, Barrier* barrier, T* scratch,
                      const ProgramSums<T>* sums) {
  const i64 tiles = (last - row + rows - 1) / rows, n = last - row;
  for (i64 i = 0; i < tiles; ++i) {
    const i64 from = row + n * i / tiles, to = row + n * (i + 1) / tiles;
    Pieces<T> pieces{scratch};
    Crew crew{barrier, thread, crew_size};
    ProgramBackward<P> tile(p, crew, rows, pieces, sums);
    const T* tape = p.tape ? p.tape + from * p.tape_width : nullptr;
    if (p.again) {
      T* own = pieces.take(rows * p.tape_width);
      Crew alone{nullptr, 0, 1};
      ProgramForward<P>(p, alone, rows, pieces).run(from, to - from, own, p.tape_width);
      tape = own;
    }
    tile.run(from, to - from, tape, p.tape_width);
  }
}

}  // namespace hjepa_fast::HJEPA_ISA
