// grad F of a whole network at given points x, and the adjoint of that: the equations of hjepa_fast/gradient_ops.py.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// Rows of numbers of which the last panel is padded with zeros.
template <class T>
HJEPA_INLINE void take_rows(T* to, i64 ld_to, const T* from, i64 rows, i64 n) {
  clear(to, rows * ld_to);
  copy_rows(to, ld_to, from, n, rows, n);
}

template <class P>
struct GradientTile {
  using T = typename P::Scalar;
  const Gradient<T>& g;
  Crew& crew;
  Network<P> at;
  i64 ldn;
  T *x, *converted;

  GradientTile(const Gradient<T>& g, Crew& crew, i64 rows, Pieces<T>& pieces)
      : g(g), crew(crew), at(g.net, crew, rows, pieces), ldn(ld<T>(g.n)) {
    x = pieces.take(rows * ldn);
    converted = pieces.take(P::DEPTH > 1 ? rows * (ldn > at.widest ? ldn : at.widest) : 0);
  }

  void run(i64 row, i64 R) {
    const Net<T>& p = g.net;
    take_rows(x, ldn, g.x + row * g.n, R, g.n);
    product<P>(crew, x, ldn, R, g.n, g.by_WT, at.h, converted, [&](T* a, i64 r, i64 column) {
      T* to = at.a + r * at.w + column;
      for (i64 j = 0; j < NR<T>; j += LANES<T>) store(to + j, load(a + j) + load(g.b + column + j));
    });
    at.run(R, g.value + row, 1, Layers<T>::on(g.tape + row * p.tape_width, p.tape_width, p));
    product<P>(crew, at.e[0], at.w, R, at.h, g.by_W, g.n, converted,
               [&](T* y, i64 r, i64 column) { put(g.gradient + (row + r) * g.n, y, column, g.n); });
  }
};

template <class P>
struct GradientAdjointTile {
  using T = typename P::Scalar;
  const Gradient<T>& g;
  Crew& crew;
  const GradientSums<T>* sums;
  NetworkAdjoint<P> at;
  i64 ldn;
  T *G, *x, *converted;

  GradientAdjointTile(const Gradient<T>& g, Crew& crew, i64 rows, Pieces<T>& pieces, const GradientSums<T>* sums)
      : g(g), crew(crew), sums(sums), at(g.net, crew, rows, pieces, sums ? &sums->tail : nullptr), ldn(ld<T>(g.n)) {
    G = pieces.take(rows * ldn);
    x = pieces.take(rows * ldn);
    converted = pieces.take(P::DEPTH > 1 ? rows * (ldn > at.widest ? ldn : at.widest) : 0);
  }

  // The products of what this tile's rows add to the weights' gradients.
  void add_products(i64 row, i64 R) {
    take_rows(x, ldn, g.x + row * g.n, R, g.n);
    const auto add = [&](const T* left, const T* right) {
      if (g.n < g.NARROW)
        add_outer(crew, right, ldn, g.n, left, at.w, at.h, R, sums->W, at.w);
      else
        add_outer(crew, left, at.w, at.h, right, ldn, g.n, R, sums->W, ldn);
    };
    add(at.curve[0], x);
    if (g.g_gradient) add(at.e[0], G);
    at.gathered = 1;
    at.flush(R);
  }

  void run(i64 row, i64 R) {
    const Net<T>& p = g.net;
    const i64 h = at.h, w = at.w, n = g.n;
    at.clear_padding(R);
    at.restore(g.tape + row * p.tape_width, p.tape_width, R);
    if (g.g_gradient) {
      take_rows(G, ldn, g.g_gradient + row * n, R, n);
      product<P>(crew, G, ldn, R, n, g.by_WT, h, converted, [&](T* v, i64 r, i64 column) {
        for (i64 j = 0; j < NR<T>; j += LANES<T>) store(at.v + r * w + column + j, load(v + j));
      });
    } else {
      clear(at.v, R * w);
    }
    at.enter(R);
    at.adjoint(g.g_value ? g.g_value + row : nullptr, 1, R, sums != nullptr);
    const T* nu = at.curve[0];
    product<P>(crew, nu, w, R, h, g.by_W, n, converted,
               [&](T* y, i64 r, i64 column) { put(g.g_x + (row + r) * n, y, column, n); });
    if (!sums) return;
    // a tile's sum is formed before it is added to those of others: one number after the other would lose a digit
    crew.template over_columns<T>(h, [&](i64 i) {
      Vec<T> db = {};
      for (i64 r = 0; r < R; ++r) db += load(nu + r * w + i);
      store(sums->b + i, load(sums->b + i) + db);
    });
    if (sums->W) return add_products(row, R);
    copy_rows(g.delta + row * h, h, at.e[0], w, R, h);
    copy_rows(g.nu + row * h, h, nu, w, R, h);
    for (int l = 0; l + 1 < p.L; ++l)
      for (const i64 half : {0, 1}) {
        const i64 m = p.width[l + 1], k = p.width[l], to = half * g.B + row;
        copy_rows(g.left[l] + to * m, m, at.left[l] + half * R * at.lds[l + 1], at.lds[l + 1], R, m);
        copy_rows(g.right[l] + to * k, k, at.right[l] + half * R * at.lds[l], at.lds[l], R, k);
      }
  }
};

template <class P, class T>
i64 gradient_scratch(const Gradient<T>& g, i64 rows) {
  Pieces<T> pieces{nullptr};
  Crew crew{nullptr, 0, 1};
  GradientTile<P> tile(g, crew, rows, pieces);
  return pieces.used;
}

template <class P, class T>
void gradient(const Gradient<T>& g, i64 row, i64 rows, T* scratch) {
  Pieces<T> pieces{scratch};
  Crew crew{nullptr, 0, 1};
  GradientTile<P>(g, crew, rows, pieces).run(row, rows);
}

template <class P, class T>
i64 gradient_backward_scratch(const Gradient<T>& g, i64 rows, bool with_sums) {
  Pieces<T> pieces{nullptr};
  const GradientSums<T> any{};
  Crew crew{nullptr, 0, 1};
  GradientAdjointTile<P> tile(g, crew, rows, pieces, with_sums ? &any : nullptr);
  return pieces.used;
}

template <class P, class T>
void gradient_backward(const Gradient<T>& g, i64 row, i64 last, i64 rows, T* scratch, const GradientSums<T>* sums) {
  const i64 n = last - row, tiles = (n + rows - 1) / rows;
  for (i64 i = 0; i < tiles; ++i) {
    const i64 from = row + n * i / tiles, to = row + n * (i + 1) / tiles;
    Pieces<T> pieces{scratch};
    Crew crew{nullptr, 0, 1};
    GradientAdjointTile<P>(g, crew, rows, pieces, sums).run(from, to - from);
  }
}

}  // namespace hjepa_fast::HJEPA_ISA
