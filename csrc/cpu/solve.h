// x = G(x) for every row of a tile, by Anderson's method: as fixed_point() in hjepa_fast/backends/torch.py.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

constexpr int DEPTH = 3;          // earlier differences that are combined
constexpr int EXTRAPOLATION = 5;  // earlier values that a polynomial goes through

// The next value of a polynomial through the last n, the last one first.
HJEPA_INLINE int extrapolation(int n, int i) {
  constexpr int coefficients[EXTRAPOLATION][EXTRAPOLATION] = {{1}, {2, -1}, {3, -3, 1}, {4, -6, 4, -1}, {5, -10, 10, -5, 1}};
  return coefficients[n - 1][i];
}

template <class T>
struct FixedPoint {
  i64 h, w;
  T *x_before, *r_before, *r, *dx[DEPTH], *dr[DEPTH];
  T *residual, *evaluations, *active;  // of each row

  FixedPoint(i64 rows, i64 h, i64 w, Pieces<T>& pieces) : h(h), w(w) {
    for (T** x : {&x_before, &r_before, &r}) *x = pieces.take(rows * w);
    for (int i = 0; i < DEPTH; ++i) dx[i] = pieces.take(rows * w), dr[i] = pieces.take(rows * w);
    for (T** x : {&residual, &evaluations, &active}) *x = pieces.take(rows);
  }

  // Solves for x [R, h], where g(x) must leave G(x) in `gx`. Residuals are relative to the largest number of a row of x, or
  // to `floor`. Each thread of the crew looks at its share of the rows.
  template <class G>
  void solve(const Crew& crew, T* x, const T* gx, i64 R, T floor, double tolerance, i64 most, G g) {
    const i64 first = crew.first(R), last = crew.last(R);
    for (i64 i = first; i < last; ++i) active[i] = 1, evaluations[i] = 0;
    for (i64 n = 1;; ++n) {
      g();
      crew.meet();
      for (i64 i = first; i < last; ++i) look(x + i * w, gx + i * w, r + i * w, i, floor, tolerance);
      crew.meet();
      bool again = false;
      for (i64 i = 0; i < R; ++i) again |= active[i] != 0;
      if (!again || n == most) return;
      const int used = n - 1 < DEPTH ? int(n - 1) : DEPTH, slot = int(n + DEPTH - 2) % DEPTH;
      for (i64 i = first; i < last; ++i) {
        if (!active[i]) continue;
        T *xi = x + i * w, *ri = r + i * w, *xb = x_before + i * w, *rb = r_before + i * w;
        if (n > 1) {
          subtract(xi, xb, dx[slot] + i * w);
          subtract(ri, rb, dr[slot] + i * w);
        }
        __builtin_memcpy(xb, xi, w * sizeof(T));
        __builtin_memcpy(rb, ri, w * sizeof(T));
        move(xi, ri, i, used);
      }
      crew.meet();
    }
  }

 private:
  void subtract(const T* x, const T* y, T* to) const {
    for (i64 c = 0; c < h; c += LANES<T>) store(to + c, load(x + c) - load(y + c));
  }

  // Whether row i must go on: active[i].
  void look(const T* x, const T* gx, T* r, i64 i, T floor, double tolerance) {
    Vec<T> largest_r = {}, largest_x = {}, not_finite = {};
    for (i64 c = 0; c < h; c += LANES<T>) {
      const Vec<T> xc = load(x + c), rc = load(gx + c) - xc;
      store(r + c, rc);
      const Vec<T> size_r = rc < 0 ? -rc : rc, size_x = xc < 0 ? -xc : xc;
      largest_r = size_r > largest_r ? size_r : largest_r;
      largest_x = size_x > largest_x ? size_x : largest_x;
      not_finite += rc - rc;
    }
    T size = 0, scale = floor;
    for (int l = 0; l < LANES<T>; ++l) {
      size = largest_r[l] > size ? largest_r[l] : size;
      scale = largest_x[l] > scale ? largest_x[l] : scale;
    }
    residual[i] = sum<T>(not_finite) == 0 ? size / scale : T(__builtin_nan(""));
    evaluations[i] += active[i];
    active[i] = active[i] && residual[i] > tolerance;
  }

  // x += r, corrected by the combination of earlier differences of x that makes r vanish best.
  void move(T* x, const T* r_row, i64 i, int used) {
    T gram[DEPTH][DEPTH], scale[DEPTH], c[DEPTH];
    for (int j = 0; j < used; ++j)
      for (int k = 0; k <= j; ++k) gram[j][k] = dot(dr[j] + i * w, dr[k] + i * w, h);
    constexpr T eps = sizeof(T) == 4 ? T(1.1920929e-07) : T(2.220446049250313e-16);
    constexpr T tiny = sizeof(T) == 4 ? T(1.1754944e-38) : T(2.2250738585072014e-308);
    for (int j = 0; j < used; ++j) {
      scale[j] = 1 / (sizeof(T) == 4 ? T(__builtin_sqrtf(float(gram[j][j] > tiny ? gram[j][j] : tiny)))
                                     : T(__builtin_sqrt(double(gram[j][j] > tiny ? gram[j][j] : tiny))));
      c[j] = dot(dr[j] + i * w, r_row, h) * scale[j];
    }
    // Cholesky; differences that are almost parallel say nothing new: the ridge keeps them from cancelling each other
    for (int j = 0; j < used; ++j)
      for (int k = 0; k <= j; ++k) {
        T s = gram[j][k] * scale[j] * scale[k] + (j == k ? 10 * eps : T(0));
        for (int m = 0; m < k; ++m) s -= gram[j][m] * gram[k][m];
        gram[j][k] = j == k ? T(__builtin_sqrt(double(s > eps ? s : eps))) : s / gram[k][k];
      }
    for (int j = 0; j < used; ++j) {
      for (int m = 0; m < j; ++m) c[j] -= gram[j][m] * c[m];
      c[j] /= gram[j][j];
    }
    for (int j = used - 1; j >= 0; --j) {
      for (int m = j + 1; m < used; ++m) c[j] -= gram[m][j] * c[m];
      c[j] /= gram[j][j];
    }
    for (i64 k = 0; k < h; k += LANES<T>) {
      Vec<T> v = load(x + k) + load(r_row + k);
      for (int j = 0; j < used; ++j) v -= c[j] * scale[j] * (load(dx[j] + i * w + k) + load(dr[j] + i * w + k));
      store(x + k, v);
    }
  }
};

}  // namespace hjepa_fast::HJEPA_ISA
