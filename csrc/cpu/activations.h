// s, s', s'' of every activation (Python: activations.py). By polynomials, good to 1-2 units in the last place in float32 and to
// 3 in float64, where the normal distribution and the sine come lane by lane from the C library. Infinities and NaN come out as
// in the C library.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

template <class T>
struct Derivatives {
  Vec<T> s, s1, s2;
};

template <class F>
HJEPA_INLINE Vec<double> lanewise(Vec<double> x, F f) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = f(x[i]);
  return x;
}

template <class T>
HJEPA_INLINE Vec<T> absolute(Vec<T> x) {
  return bits<Vec<T>>(bits<IntVec<T>>(x) & ~bits<IntVec<T>>(splat<T>(T(-0.0))));
}

template <class T>
HJEPA_INLINE Vec<T> with_sign_of(Vec<T> x, Vec<T> sign) {
  const IntVec<T> mask = bits<IntVec<T>>(splat<T>(T(-0.0)));
  return bits<Vec<T>>((bits<IntVec<T>>(x) & ~mask) | (bits<IntVec<T>>(sign) & mask));
}

// Nearest integer of |x| < 2^22, as a float: adding 1.5 2^23 leaves no bits for the fraction.
HJEPA_INLINE Vec<float> nearest(Vec<float> x) { return (x + 12582912.0f) - 12582912.0f; }

HJEPA_INLINE Vec<float> exp(Vec<float> x) {
  // beyond these the result is inf or 0 either way, and n stays a small integer; NaN passes both comparisons
  x = x > 89.0f ? splat<float>(89.0f) : x;
  x = x < -104.0f ? splat<float>(-104.0f) : x;
  const Vec<float> n = nearest(x * 1.44269504f);
  Vec<float> r = x - n * 0.693359375f;  // ln 2 in two parts: n times the first is exact
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two factors, so that results below the smallest normal number and above the largest come out right
  const IntVec<float> k = __builtin_convertvector(n, IntVec<float>), half = k >> 1;
  return p * bits<Vec<float>>((half + 127) << 23) * bits<Vec<float>>((k - half + 127) << 23);
}

// A polynomial by Horner's rule, the highest coefficient first.
template <int n>
HJEPA_INLINE Vec<double> polynomial(const double (&c)[n], Vec<double> x) {
  Vec<double> p = splat<double>(c[0]);
  for (int i = 1; i < n; ++i) p = p * x + c[i];
  return p;
}

// k and p of exp(x) = 2^k (1 + p), |p| < 1/2, for |x| < 800: the Taylor series of exp(r) - 1 for |r| < 0.35.
HJEPA_INLINE Vec<double> reduced_exp(Vec<double> x, IntVec<double>& k) {
  constexpr double shift = 6755399441055744.0;  // 1.5 2^52 leaves no bits for a fraction, and the integer in the lowest ones
  const Vec<double> shifted = x * 1.4426950408889634 + shift, n = shifted - shift;
  k = bits<IntVec<double>>(shifted) - bits<IntVec<double>>(splat<double>(shift));
  Vec<double> r = x - n * 6.93147180369123816490e-01;  // ln 2 in two parts: n times the first is exact
  r = r - n * 1.90821492927058770002e-10;
  constexpr double taylor[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
                               1 / 5040.0,       1 / 720.0,       1 / 120.0,      1 / 24.0,      1 / 6.0,      0.5};
  return r + (r * r) * polynomial(taylor, r);
}
HJEPA_INLINE Vec<double> exp(Vec<double> x) {
  x = x > 710.0 ? splat<double>(710.0) : x;  // as for float32
  x = x < -746.0 ? splat<double>(-746.0) : x;
  IntVec<double> k;
  const Vec<double> p = reduced_exp(x, k);
  const IntVec<double> half = k >> 1;
  return (p + 1.0) * bits<Vec<double>>((half + 1023) << 52) * bits<Vec<double>>((k - half + 1023) << 52);
}

// exp(x) - 1 for |x| <= 40, to relative precision.
HJEPA_INLINE Vec<double> expm1_of_moderate(Vec<double> x) {
  IntVec<double> k;
  const Vec<double> p = reduced_exp(x, k), power = bits<Vec<double>>((k + 1023) << 52);
  return power * p + (power - 1.0);
}

// log(1 + u) for u in [0, 1], to relative precision even for tiny u: 2 atanh(r) with r = u / (2 + u).
HJEPA_INLINE Vec<float> log1p_of(Vec<float> r) {
  const Vec<float> r2 = r * r;
  Vec<float> p = r2 * 1.2206534296e-01f + 1.0696625710e-01f;
  p = p * r2 + 1.4310361445e-01f;
  p = p * r2 + 1.9999346137e-01f;
  p = p * r2 + 3.3333340287e-01f;
  return 2.0f * (r + r * (r2 * p));
}

// 1 / (1 + u) and log(1 + u), of which one division serves both.
HJEPA_INLINE void reciprocal_and_log1p(Vec<float> u, Vec<float>& reciprocal, Vec<float>& log1p) {
  const Vec<float> u1 = 1.0f + u, u2 = 2.0f + u, r = 1.0f / (u1 * u2);
  reciprocal = u2 * r;
  log1p = log1p_of(u * u1 * r);
}
HJEPA_INLINE void reciprocal_and_log1p(Vec<double> u, Vec<double>& reciprocal, Vec<double>& log1p) {
  reciprocal = 1.0 / (1.0 + u);
  const Vec<double> r = u / (2.0 + u), r2 = r * r;  // as in log1p_of, by the series of atanh
  constexpr double series[] = {1 / 33.0, 1 / 31.0, 1 / 29.0, 1 / 27.0, 1 / 25.0, 1 / 23.0, 1 / 21.0, 1 / 19.0,
                               1 / 17.0, 1 / 15.0, 1 / 13.0, 1 / 11.0, 1 / 9.0,  1 / 7.0,  1 / 5.0,  1 / 3.0};
  log1p = 2.0 * (r + r * (r2 * polynomial(series, r2)));
}

// exp(x) - 1 for x <= 0.
HJEPA_INLINE Vec<float> expm1_of_negative(Vec<float> x, Vec<float> e) {
  Vec<float> p = x * 2.48015873e-05f + 1.98412698e-04f;
  p = p * x + 1.38888889e-03f;
  p = p * x + 8.33333333e-03f;
  p = p * x + 4.16666667e-02f;
  p = p * x + 1.66666667e-01f;
  p = p * x + 0.5f;
  return x > -0.5f ? x + (x * x) * p : e - 1.0f;
}
HJEPA_INLINE Vec<double> expm1_of_negative(Vec<double> x, Vec<double>) {
  return expm1_of_moderate(x < -40.0 ? splat<double>(-40.0) : x);
}

HJEPA_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> y = absolute<float>(x), x2 = x * x;
  Vec<float> p = x2 * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const Vec<float> small = x + x * (x2 * p);
  const Vec<float> large = with_sign_of<float>(1.0f - 2.0f / (exp(2.0f * y) + 1.0f), x);
  return y > 0.625f ? large : small;
}
HJEPA_INLINE Vec<double> tanh(Vec<double> x) {
  const Vec<double> y = absolute<double>(x), e = expm1_of_moderate(2.0 * (y > 20.0 ? splat<double>(20.0) : y));
  return with_sign_of<double>(e / (e + 2.0), x);
}

// For formulas that cancel where |t| is near 1: in float64 the C library's, so that they cancel as PyTorch's do.
HJEPA_INLINE Vec<float> tanh_of_library(Vec<float> x) { return tanh(x); }
HJEPA_INLINE Vec<double> tanh_of_library(Vec<double> x) {
  return lanewise(x, [](double v) { return __builtin_tanh(v); });
}

// The normal distribution's cdf at a, given the factor exp(-a^2 / 2) of its pdf.
HJEPA_INLINE Vec<float> normal_cdf(Vec<float> a, Vec<float> gauss) {
  const Vec<float> x = a * 0.70710678f, y = absolute<float>(x), x2 = x * x;
  Vec<float> p = x2 * 7.8538607340e-05f - 8.0101937056e-04f;
  p = p * x2 + 5.1883277483e-03f;
  p = p * x2 - 2.6853812858e-02f;
  p = p * x2 + 1.1283585429e-01f;
  p = p * x2 - 3.7612625957e-01f;
  const Vec<float> small = 0.5f + 0.5f * (x + x * (p * x2 + 1.2837916710e-01f));
  const Vec<float> t = 1.0f / (1.0f + 0.5f * y);  // erfc(y) exp(y^2) is smooth in t
  Vec<float> q = t * -3.0497137457e-02f + 1.9388347864e-01f;
  q = q * t - 3.6694049835e-01f;
  q = q * t + 1.9181883335e-01f;
  q = q * t + 9.5352539793e-03f;
  q = q * t + 1.9376631081e-01f;
  q = q * t + 2.4433220923e-01f;
  q = q * t + 2.8229409456e-01f;
  q = q * t + 2.8208804131e-01f;
  const Vec<float> upper = 0.5f * gauss * (q * t);
  const Vec<float> large = x > 0.0f ? 1.0f - upper : upper;
  return y > 1.0f ? large : small;
}
HJEPA_INLINE Vec<double> normal_cdf(Vec<double> a, Vec<double>) {
  return lanewise(a, [](double v) { return 0.5 * __builtin_erfc(-0.70710678118654752440 * v); });
}

HJEPA_INLINE void sincos(Vec<float> x, Vec<float>& s, Vec<float>& c) {
  const Vec<float> n = nearest(x * 0.636619772f);
  // pi/2 in three parts: n times the first two is exact
  Vec<float> r = x - n * 1.5703125f;
  r = r - n * 4.837512969970703125e-4f;
  r = r - n * 7.54978995489188216e-8f;
  const Vec<float> r2 = r * r;
  Vec<float> sine = r2 * -1.9515295891e-4f + 8.3321608736e-3f;
  sine = sine * r2 - 1.6666654611e-1f;
  sine = r + r * (r2 * sine);
  Vec<float> cosine = r2 * 2.443315711809948e-5f - 1.388731625493765e-3f;
  cosine = cosine * r2 + 4.166664568298827e-2f;
  cosine = 1.0f - 0.5f * r2 + (r2 * r2) * cosine;
  const IntVec<float> quadrant = __builtin_convertvector(n, IntVec<float>);
  const IntVec<float> swap = (quadrant & 1) == 1;
  const Vec<float> s0 = swap ? cosine : sine, c0 = swap ? sine : cosine;
  s = (quadrant & 2) == 2 ? -s0 : s0;
  c = ((quadrant + 1) & 2) == 2 ? -c0 : c0;
  // far out the reduction above is not enough; NaN and infinities go the same way
  const IntVec<float> near = absolute<float>(x) < 4096.0f;
  for (int i = 0; i < LANES<float>; ++i)
    if (!near[i]) s[i] = __builtin_sinf(x[i]), c[i] = __builtin_cosf(x[i]);
}
HJEPA_INLINE void sincos(Vec<double> x, Vec<double>& s, Vec<double>& c) {
  s = lanewise(x, [](double v) { return __builtin_sin(v); });
  c = lanewise(x, [](double v) { return __builtin_cos(v); });
}

// 1 / (1 + exp(-a)), and u = exp(-|a|), from one exponential that cannot overflow.
template <class T>
HJEPA_INLINE Vec<T> sigmoid(Vec<T> a, Vec<T>& u) {
  u = exp(-absolute<T>(a));
  const Vec<T> r = T(1) / (T(1) + u);
  return a < T(0) ? u * r : r;
}

template <Kind kind, class T>
HJEPA_INLINE Derivatives<T> derivatives(const Activation& activation, Vec<T> a) {
  Vec<T> u;
  if constexpr (kind == Kind::softplus) {
    const T beta = T(activation.beta), threshold = T(activation.threshold);
    const Vec<T> x = beta * a;
    Vec<T> r, log1p;
    u = exp(-absolute<T>(x));
    reciprocal_and_log1p(u, r, log1p);
    const Vec<T> sigma = x < T(0) ? u * r : r;
    const Vec<T> soft = ((x > T(0) ? x : splat<T>(0)) + log1p) * T(1 / activation.beta);
    const auto linear = x > threshold;
    return {linear ? a : soft, linear ? splat<T>(1) : sigma, linear ? splat<T>(0) : beta * sigma * (T(1) - sigma)};
  } else if constexpr (kind == Kind::tanh) {
    const Vec<T> t = tanh(a), slope = T(1) - t * t;
    return {t, slope, T(-2) * t * slope};
  } else if constexpr (kind == Kind::silu) {
    const Vec<T> sigma = sigmoid<T>(a, u), slope = sigma * (T(1) - sigma);
    return {a * sigma, sigma + a * slope, slope * (T(2) + a * (T(1) - T(2) * sigma))};
  } else if constexpr (kind == Kind::gelu) {
    const Vec<T> gauss = exp(T(-0.5) * a * a), cdf = normal_cdf(a, gauss), pdf = gauss * T(0.39894228040143267794);
    return {a * cdf, cdf + a * pdf, pdf * (T(2) - a * a)};
  } else if constexpr (kind == Kind::gelu_tanh) {
    const T scale = T(0.79788456080286535588), cubic = T(0.044715);
    const Vec<T> t = tanh_of_library(scale * (a + cubic * (a * a * a)));
    const Vec<T> u1 = scale * (T(1) + T(3) * cubic * a * a), u2 = T(6) * scale * cubic * a, slope = T(1) - t * t;
    return {T(0.5) * a * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * a * slope * u1,
            slope * u1 + T(0.5) * a * slope * (u2 - T(2) * t * u1 * u1)};
  } else if constexpr (kind == Kind::sigmoid) {
    const Vec<T> s = sigmoid<T>(a, u), slope = s * (T(1) - s);
    return {s, slope, slope * (T(1) - T(2) * s)};
  } else if constexpr (kind == Kind::elu) {
    const T alpha = T(activation.beta);
    const auto linear = a > T(0);
    const Vec<T> x = linear ? splat<T>(0) : a, e = exp(x), slope = alpha * e;
    return {linear ? a : alpha * expm1_of_negative(x, e), linear ? splat<T>(1) : slope, linear ? splat<T>(0) : slope};
  } else if constexpr (kind == Kind::quadratic) {
    return {a * a, T(2) * a, splat<T>(2)};
  } else {
    Vec<T> s, c;
    sincos(a, s, c);
    return {s, c, -s};
  }
}

// Calls f.operator()<kind>() for the activation's kind: the choice is made once for a loop, not once a number.
template <class F>
HJEPA_INLINE void with_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::softplus: return f.template operator()<Kind::softplus>();
    case Kind::tanh: return f.template operator()<Kind::tanh>();
    case Kind::silu: return f.template operator()<Kind::silu>();
    case Kind::gelu: return f.template operator()<Kind::gelu>();
    case Kind::gelu_tanh: return f.template operator()<Kind::gelu_tanh>();
    case Kind::sin: return f.template operator()<Kind::sin>();
    case Kind::sigmoid: return f.template operator()<Kind::sigmoid>();
    case Kind::elu: return f.template operator()<Kind::elu>();
    case Kind::quadratic: return f.template operator()<Kind::quadratic>();
  }
}

// z = s(a), d = s'(a); n is a multiple of the vector length.
template <class T>
__attribute__((noinline)) void activate(const Activation& activation, const T* a, T* z, T* d, i64 n) {
  with_kind(activation.kind, [&]<Kind kind>() {
    for (i64 i = 0; i < n; i += LANES<T>) {
      const Derivatives<T> at = derivatives<kind, T>(activation, load(a + i));
      store(z + i, at.s);
      store(d + i, at.s1);
    }
  });
}

// z = s(a), d = s'(a), c = s''(a).
template <class T>
__attribute__((noinline)) void activate(const Activation& activation, const T* a, T* z, T* d, T* c, i64 n) {
  with_kind(activation.kind, [&]<Kind kind>() {
    for (i64 i = 0; i < n; i += LANES<T>) {
      const Derivatives<T> at = derivatives<kind, T>(activation, load(a + i));
      store(z + i, at.s);
      store(d + i, at.s1);
      store(c + i, at.s2);
    }
  });
}

// The same with the tangents of a: zd = s'(a) ad, curve = s''(a) ad.
template <class T>
__attribute__((noinline)) void activate(const Activation& activation, const T* a, const T* ad, T* z, T* d, T* zd, T* curve,
                                        i64 n) {
  with_kind(activation.kind, [&]<Kind kind>() {
    for (i64 i = 0; i < n; i += LANES<T>) {
      const Derivatives<T> at = derivatives<kind, T>(activation, load(a + i));
      const Vec<T> tangent = load(ad + i);
      store(z + i, at.s);
      store(d + i, at.s1);
      store(zd + i, at.s1 * tangent);
      store(curve + i, at.s2 * tangent);
    }
  });
}

}  // namespace hjepa_fast::HJEPA_ISA
