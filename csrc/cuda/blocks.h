// What the loops forward (forward.h) and back (backward.h) are made of: every step of a rollout in one launch, no number in
// device memory between two layers. See hjepa_fast/backends/torch.py for the mathematics.
//
// A team of blocks shares out the features of every layer. A block keeps the rows of W and K that lead to its features and
// uses them in both directions: a layer up is dot products of its rows with the whole layer below, which all blocks have sent
// each other ("gather"); a layer back adds multiples of the same rows, and each sum goes to the block that owns the feature
// ("scatter"), which adds up what all of them sent, always in the same order. The last layer up and the first one back need
// no exchange in between: the rows of W_L that give e_L are those that e_L multiplies. That makes 2 (L - 1) + 1 exchanges a
// sub-step that kicks or drifts, each with one barrier, as their buffers alternate: before a block can write to a buffer again,
// all have come to the barrier after they read it.
#pragma once

#include <math.h>

#include "team.h"

namespace hjepa_fast::cuda {

struct bf16_t {
  unsigned short bits;
};

HJEPA_DEVICE float4 load4(const float* x) { return load_as<float4>(x); }
HJEPA_DEVICE float2 load2(const float* x) { return load_as<float2>(x); }
HJEPA_DEVICE float2 two(unsigned bits) { return {as_float(bits << 16), as_float(bits & 0xffff0000u)}; }
HJEPA_DEVICE float2 load2(const bf16_t* x) { return two(load_as<unsigned>(x)); }
HJEPA_DEVICE float4 load4(const bf16_t* x) {
  const uint2 bits = load_as<uint2>(x);
  const float2 low = two(bits.x), high = two(bits.y);
  return {low.x, low.y, high.x, high.y};
}

struct Derivatives {
  float s, s1, s2;
};

// s(a), s'(a) and, if BENT, s''(a) (Python: activations.py); not inlined because it is called in several places.
template <bool BENT>
HJEPA_FUNCTION Derivatives derivatives(Activation s, float a) {
  switch (s.kind) {
    case SOFTPLUS: {
      const float x = s.beta * a, u = expf(-fabsf(x)), r = 1.0f / (1.0f + u);
      if (x > s.threshold) return {a, 1.0f, 0.0f};
      return {(fmaxf(x, 0.0f) + log1pf(u)) / s.beta, x < 0.0f ? u * r : r, BENT ? s.beta * (u * r * r) : 0.0f};
    }
    case TANH: {
      const float t = tanhf(a), slope = 1.0f - t * t;
      return {t, slope, -2.0f * t * slope};
    }
    case SILU: {
      const float u = expf(-fabsf(a)), r = 1.0f / (1.0f + u), sigma = a < 0.0f ? u * r : r, slope = u * r * r;
      return {a * sigma, sigma + a * slope, slope * (2.0f + a * (1.0f - 2.0f * sigma))};
    }
    case GELU: {
      const float cdf = 0.5f * erfcf(a * -0.70710678118654752f), pdf = expf(-0.5f * a * a) * 0.39894228040143268f;
      return {a * cdf, cdf + a * pdf, pdf * (2.0f - a * a)};
    }
    case GELU_TANH: {
      const float t = tanhf(0.79788456080286536f * (a + 0.044715f * a * a * a)), slope = 1.0f - t * t;
      const float u1 = 0.79788456080286536f * (1.0f + 0.134145f * a * a), u2 = 0.21406444881780076f * a;
      return {0.5f * a * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * a * slope * u1,
              slope * u1 + 0.5f * a * slope * (u2 - 2.0f * t * u1 * u1)};
    }
    default: {
      const float sine = sinf(a);
      return {sine, cosf(a), -sine};
    }
  }
}

// The sums over a warp of N <= 32 numbers a lane: of number lane N / 32, to which `start` is added. A lane hands on half of
// what it has left, as long as there is more than one number; BIT tells the two lanes that exchange apart.
template <int N, int BIT = 16>
HJEPA_DEVICE float sum_over_warp(const float (&v)[N], float start) {
  if constexpr (N == 1) {
    float sum = v[0] + start;
#pragma unroll
    for (int bit = BIT; bit; bit /= 2) sum += shuffle_xor(sum, bit);
    return sum;
  } else {
    const bool upper = thread() & BIT;
    float half[N / 2];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) half[k] = (upper ? v[k + N / 2] : v[k]) + shuffle_xor(upper ? v[k] : v[k + N / 2], BIT);
    return sum_over_warp<N / 2, BIT / 2>(half, start);
  }
}

// W: float or bf16_t, of the matrices; R: samples of a team at a time, 1, 4 or 8; sums and states are float32.
// A block's own numbers are [share, R], what is gathered [R, padded(width)], what is received [team, R, share] with four more
// numbers a block, which keeps the lanes that add up off each other's banks.
template <class W, int R, class Team>
struct Blocks {
  static constexpr bool CLUSTER = Team::CLUSTER;
  static constexpr int M = 4;  // rows of a matrix that a warp takes together

  const Problem& p;
  float* const shared;
  Team team;
  int first_sample = 0;

  HJEPA_DEVICE explicit Blocks(const Problem& p) : p(p), shared(shared_memory()), team(p) {}

  HJEPA_DEVICE int first(int l) const { return team.rank * p.share[l]; }
  // features of layer l that this block owns
  HJEPA_DEVICE int owned(int l) const {
    const int left = p.width[l] - first(l);
    return left < 0 ? 0 : left < p.share[l] ? left : p.share[l];
  }
  HJEPA_DEVICE bool live(int r) const { return first_sample + r < p.B; }
  HJEPA_DEVICE int slot(int l, int from) const { return from * (R * p.share[l] + 4); }

  HJEPA_DEVICE void load() {
    for (int j = 0; j < p.L; ++j) {
      const int l = p.target(j), n = owned(l) * padded(p.columns(j)) * int(sizeof(W)) / 16;
      if (p.matrix_at[j] < 0) continue;
      const float4* from = reinterpret_cast<const float4*>(rows_in_global(j));
      float4* to = reinterpret_cast<float4*>(shared + p.matrix_at[j]);
#pragma unroll 8
      for (int i = thread(); i < n; i += n_threads()) to[i] = load_as<float4>(from + i);
    }
    for (int l = 1; l < p.L; ++l)
      for (int i = thread(); i < owned(l); i += n_threads()) shared[p.bias_at[l] + i] = p.vectors[p.bias[l] + first(l) + i];
    for (int i = thread(); i < owned(p.L - 1); i += n_threads()) shared[p.out_at + i] = p.vectors[p.out + first(p.L - 1) + i];
    if (thread() == 0) shared[p.bias_at[0]] = p.vectors[p.bias[0]];
  }

  HJEPA_DEVICE const W* rows_in_global(int j) const {
    return static_cast<const W*>(p.matrix[j]) + i64(first(p.target(j))) * padded(p.columns(j));
  }

  // f(i, r, start(i, r) + x[r] . matrix j's row i of this block, part, parts): lanes part = 0..parts-1 have the same number.
  // One of them reads what `start` reads before the others have the sum, so that f may write it.
  template <class S, class F>
  HJEPA_DEVICE void dots(int j, const float* x, S start, F f) const {
    // two loops, so that each knows which memory it reads
    if (p.matrix_at[j] >= 0)
      dots(reinterpret_cast<const W*>(shared + p.matrix_at[j]), j, x, start, f);
    else
      dots(rows_in_global(j), j, x, start, f);
  }
  template <class S, class F>
  HJEPA_DEVICE void dots(const W* matrix, int j, const float* x, S start, F f) const {
    const int n_rows = owned(p.target(j)), ld = padded(p.columns(j)), lane = thread() % 32;
    for (int row = thread() / 32 * M; row < n_rows; row += n_threads() / 32 * M) {
      float sums[M * R] = {};
#pragma unroll 2
      for (int c = 4 * lane; c < ld; c += 128) {
        float4 w[M];
#pragma unroll
        for (int k = 0; k < M; ++k) w[k] = load4(matrix + (row + k < n_rows ? row + k : row) * ld + c);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float4 xr = load4(x + r * ld + c);
#pragma unroll
          for (int k = 0; k < M; ++k) {
            float& sum = sums[k * R + r];
            sum = fmaf(w[k].x, xr.x, sum);
            sum = fmaf(w[k].y, xr.y, sum);
            sum = fmaf(w[k].z, xr.z, sum);
            sum = fmaf(w[k].w, xr.w, sum);
          }
        }
      }
      constexpr int PARTS = 32 / (M * R);
      const int which = lane / PARTS, i = row + which / R, r = which % R, part = lane % PARTS;
      const float sum = sum_over_warp(sums, part == 0 && i < n_rows ? start(i, r) : 0.0f);
      if (i < n_rows) f(i, r, sum, part, PARTS);
    }
  }

  // sends sum_i e[i] (matrix j's row i of this block) to the features' owners
  HJEPA_DEVICE void back(int j, const float* e) const {
    if (p.matrix_at[j] >= 0)
      back(reinterpret_cast<const W*>(shared + p.matrix_at[j]), j, e);
    else
      back(rows_in_global(j), j, e);
  }
  HJEPA_DEVICE void back(const W* matrix, int j, const float* e) const {
    const int n = p.columns(j), ld = padded(n), l = j < p.L - 1 ? j : 0, n_rows = owned(p.target(j)), share = p.share[l];
    for (int c = 2 * thread(); c < n; c += 2 * n_threads()) {
      float2 sums[R] = {};
#pragma unroll 4
      for (int i = 0; i < n_rows; ++i) {
        const float2 w = load2(matrix + i * ld + c);
        float er[R];
        load_row(e + i * R, er);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          sums[r].x = fmaf(er[r], w.x, sums[r].x);
          sums[r].y = fmaf(er[r], w.y, sums[r].y);
        }
      }
      // shares are even, so both columns have one owner
      const int owner = c / share, at = slot(l, team.rank) + c - owner * share;
#pragma unroll
      for (int r = 0; r < R; ++r) team.put(owner, at + r * share, sums[r]);
    }
  }
  HJEPA_DEVICE static void load_row(const float* from, float (&to)[R]) {
    if constexpr (R >= 4) {
#pragma unroll
      for (int r = 0; r < R; r += 4) {
        const float4 x = load4(from + r);
        to[r] = x.x, to[r + 1] = x.y, to[r + 2] = x.z, to[r + 3] = x.w;
      }
    } else {
      for (int r = 0; r < R; ++r) to[r] = from[r];
    }
  }

  // f(i, r, start(i, r) + what all blocks sent to feature i of this block, part, parts), as in `dots`
  template <class S, class F>
  HJEPA_DEVICE void receive(int l, S start, F f) const {
    const int share = p.share[l], parts = p.parts[l], side = 32 / parts, lane = thread() % 32, stride = slot(l, 1);
    for (int base = thread() / 32 * side; base < share * R; base += n_threads() / 32 * side) {
      const int at = base + lane % side, part = lane / side;
      const int i = at % share, r = at / share;
      const bool mine = r < R && i < owned(l);
      float sum = part == 0 && mine ? start(i, r) : 0.0f;
      if (r < R)
#pragma unroll 4
        for (int k = part; k < team.size; k += parts) sum += team.received(k * stride + at);
      for (int bit = side; bit < 32; bit *= 2) sum += shuffle_xor(sum, bit);
      if (mine) f(i, r, sum, part, parts);
    }
  }

  // f(i, r) for what this block owns of layer l
  template <class F>
  HJEPA_DEVICE void each(int l, F f) const {
    for (int at = thread(); at < owned(l) * R; at += n_threads()) f(at / R, at % R);
  }

  // Of step t, to shared memory while there is time: dt, and going back the cotangents of its energies. Every barrier empties
  // the multiprocessor's cache, so that what is read after one would come from far.
  HJEPA_DEVICE void fetch_step(i64 t) const {
    const int r = thread();
    if (r >= R) return;
    float* const to = shared + step_place(t) + r;
    if (live(r))
      copy_async(to, p.dt + i64(first_sample + r) * p.dt_stride + t * p.dt_step);
    else
      to[0] = 0.0f;
    if (live(r) && p.gE)
      copy_async(to + R, p.gE + i64(first_sample + r) * p.n_steps + t);
    else
      to[R] = 0.0f;
  }
  HJEPA_DEVICE int step_place(i64 t) const { return p.step_at + int(t & 1) * 2 * R; }

  // the sums over this block's features of layer l of `from` [share, R], to the first block
  HJEPA_DEVICE void send_sums(int l, const float* from) const {
    for (int r = thread() / 32; r < R; r += n_threads() / 32) {
      float sum[1] = {};
      for (int i = thread() % 32; i < owned(l); i += 32) sum[0] += from[i * R + r];
      const float all = sum_over_warp(sum, 0.0f);
      if (thread() % 32 == 0) team.put(0, p.sums_at + team.rank * R + r, all);
    }
  }
  // the first block, after the barrier: `start` and the sums of all blocks, to step t of `to` [B, n_steps]
  HJEPA_DEVICE void write_sums(float start, float* to, i64 t) const {
    const int r = thread();
    if (team.rank || r >= R || !live(r)) return;
    float sum = start;
    for (int k = 0; k < team.size; ++k) sum += team.received(p.sums_at + k * R + r);
    to[i64(first_sample + r) * p.n_steps + t] = sum;
  }

  // all have put layer l: pad it, exchange it
  HJEPA_DEVICE const float* gather(int l) {
    team.pad(R, p.width[l]);
    team.meet();
    return team.gathered(R, p.width[l]);
  }

};

}  // namespace hjepa_fast::cuda
