// The hidden-space loop for few samples, forward: every step of a rollout in one launch, no number in device memory between
// two layers. See hjepa_fast/backends/torch.py for the mathematics.
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

#include "device.h"
#include "problem.h"

namespace hjepa_fast::cuda {

struct bf16_t {
  unsigned short bits;
};

HJEPA_DEVICE float4 load4(const float* x) { return *reinterpret_cast<const float4*>(x); }
HJEPA_DEVICE float2 load2(const float* x) { return *reinterpret_cast<const float2*>(x); }
HJEPA_DEVICE float2 two(unsigned bits) { return {as_float(bits << 16), as_float(bits & 0xffff0000u)}; }
HJEPA_DEVICE float2 load2(const bf16_t* x) { return two(*reinterpret_cast<const unsigned*>(x)); }
HJEPA_DEVICE float4 load4(const bf16_t* x) {
  const uint2 bits = *reinterpret_cast<const uint2*>(x);
  const float2 low = two(bits.x), high = two(bits.y);
  return {low.x, low.y, high.x, high.y};
}

// s(a) and s'(a) (Python: activations.py); not inlined because it is called in five places.
HJEPA_FUNCTION float2 activate(Activation s, float a) {
  switch (s.kind) {
    case SOFTPLUS: {
      const float x = s.beta * a, u = expf(-fabsf(x)), r = 1.0f / (1.0f + u);
      const bool linear = x > s.threshold;
      return {linear ? a : (fmaxf(x, 0.0f) + log1pf(u)) / s.beta, linear ? 1.0f : x < 0.0f ? u * r : r};
    }
    case TANH: {
      const float t = tanhf(a);
      return {t, 1.0f - t * t};
    }
    case SILU: {
      const float u = expf(-fabsf(a)), r = 1.0f / (1.0f + u), sigma = a < 0.0f ? u * r : r;
      return {a * sigma, sigma + a * (u * r * r)};
    }
    case GELU: {
      const float cdf = 0.5f * erfcf(a * -0.70710678118654752f), pdf = expf(-0.5f * a * a) * 0.39894228040143268f;
      return {a * cdf, cdf + a * pdf};
    }
    case GELU_TANH: {
      const float t = tanhf(0.79788456080286536f * (a + 0.044715f * a * a * a));
      const float slope = (1.0f - t * t) * 0.79788456080286536f * (1.0f + 0.134145f * a * a);
      return {0.5f * a * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * a * slope};
    }
    default: return {sinf(a), cosf(a)};
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

// How blocks of a team send numbers to each other's buffers. `put` and `put_all` are for the buffer that is read after the
// next `meet`; of `parts` lanes that have the same number for all, each sends to some.

// A cluster: the buffers are in shared memory, and blocks write to that of others.
struct Cluster {
  float* buffers;
  int buffer_size, size, rank, index, count, flip = 0;

  HJEPA_DEVICE explicit Cluster(const Problem& p)
      : buffers(shared_memory() + p.buffer_at), buffer_size(p.buffer_size), size(p.team), rank(block() % p.team),
        index(block() / p.team), count(p.n_teams) {}

  HJEPA_DEVICE float* out() const { return buffers + flip * buffer_size; }
  HJEPA_DEVICE const float* in() const { return buffers + (1 - flip) * buffer_size; }

  // no block writes to another before that has started
  HJEPA_DEVICE void start() const { cluster_sync(); }
  template <class V>
  HJEPA_DEVICE void put(int owner, int at, V v) const { store_remote(out() + at, owner, v); }
  HJEPA_DEVICE void put_all(int at, float v, int part, int parts) const {
    for (int k = part; k < size; k += parts) store_remote(out() + at, k, v);
  }
  // zeros after the n numbers of each row of a layer: they meet the zeros of padded matrices
  HJEPA_DEVICE void pad(int rows, int n) const {
    const int ld = padded(n);
    for (int i = thread(); i < rows * (ld - n); i += n_threads()) out()[i / (ld - n) * ld + n + i % (ld - n)] = 0.0f;
  }
  HJEPA_DEVICE void meet() {
    cluster_sync();
    flip = 1 - flip;
  }
  // the layer [rows, padded(n)] that all have put, in shared memory
  HJEPA_DEVICE const float* gathered(int, int) const { return in(); }
  HJEPA_DEVICE float received(int at) const { return in()[at]; }
};

// A grid whose blocks all run at the same time: the buffers are in the L2 cache. At the barrier a block raises its own flag
// and waits for those of its team, which costs one store and one load's way through the L2 cache and no atomic operation.
struct Grid {
  float *buffers, *local;
  int* flags;
  int buffer_size, size, rank, index, count, flip = 0, met = 0;

  HJEPA_DEVICE explicit Grid(const Problem& p)
      : local(shared_memory() + p.buffer_at), buffer_size(p.buffer_size), size(p.team), rank(block() % p.team),
        index(block() / p.team), count(p.n_teams) {
    buffers = p.exchange + i64(index) * 2 * (size + 1) * buffer_size;
    flags = p.flags + index * size;
  }

  HJEPA_DEVICE float* buffer(int flip, int owner) const { return buffers + i64(flip * (size + 1) + owner) * buffer_size; }

  HJEPA_DEVICE void start() const { sync(); }
  template <class V>
  HJEPA_DEVICE void put(int owner, int at, V v) const {
    store_shared_out(reinterpret_cast<V*>(buffer(flip, owner) + at), v);
  }
  HJEPA_DEVICE void put_all(int at, float v, int part, int) const {
    if (part == 0) store_shared_out(buffer(flip, size) + at, v);
  }
  HJEPA_DEVICE void pad(int, int) const {}
  HJEPA_DEVICE void meet() {
    ++met;
    sync();
    if (thread() == 0) publish(flags + rank, met);
    if (thread() < size) await(flags + thread(), met);
    sync();
    flip = 1 - flip;
  }
  HJEPA_DEVICE const float* gathered(int rows, int n) const {
    const int ld = padded(n);
    const float4* from = reinterpret_cast<const float4*>(buffer(1 - flip, size));
    for (int i = thread(); i < rows * ld / 4; i += n_threads()) {
      float4 x = load_shared_out(from + i);
      const int real = n - 4 * i % ld;
      if (real < 1) x.x = 0.0f;
      if (real < 2) x.y = 0.0f;
      if (real < 3) x.z = 0.0f;
      if (real < 4) x.w = 0.0f;
      reinterpret_cast<float4*>(local)[i] = x;
    }
    sync();
    return local;
  }
  HJEPA_DEVICE float received(int at) const { return load_shared_out(buffer(1 - flip, rank) + at); }
};

// W: float or bf16_t, of the matrices; R: samples of a team at a time, 1, 2, 4 or 8; sums and states are float32.
// A block's own numbers are [share, R], what is gathered [R, padded(width)], what is received [team, R, share] with four more
// numbers a block, which keeps the lanes that add up off each other's banks.
template <class W, int R, class Team>
struct Rollout {
  static constexpr int M = 4;  // rows of a matrix that a warp takes together

  const Problem& p;
  float* const shared;
  Team team;
  int first_sample = 0;

  HJEPA_DEVICE explicit Rollout(const Problem& p) : p(p), shared(shared_memory()), team(p) {}

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
      for (int i = thread(); i < n; i += n_threads()) to[i] = from[i];
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

  HJEPA_DEVICE void tape(int r, i64 t, int i, int at, float v) const {
    p.tape[((i64(first_sample + r) * p.n_steps + t) * p.n_sub + i) * p.tape_width + at] = v;
  }
  HJEPA_DEVICE bool stores_layers() const { return p.tape_width > p.width[0]; }

  // a of the first layer at the point of sub-step i of step t: leaves z for the next gather
  HJEPA_DEVICE void enter(int i, int r, float a, i64 t, int sub, int part, int parts) const {
    const int at = i * R + r;
    const float2 s = activate(p.activation, a);
    if (p.L > 1) team.put_all(r * padded(p.width[0]) + first(0) + i, s.x, part, parts);
    if (part) return;
    shared[p.a_at + at] = a;
    shared[p.slope_at[0] + at] = s.y;
    if (p.L == 1) shared[p.wz_at + at] = shared[p.out_at + i] * s.x;
    if (p.tape_width && live(r)) tape(r, t, sub, p.a_on_tape[0] + first(0) + i, a);
  }

  // a after sub-step i of step t
  HJEPA_DEVICE void arrive(int i, int r, float a, i64 t, int sub, int part, int parts) const {
    if (++sub == p.n_sub) sub = 0, ++t;
    if (t < p.n_steps)
      enter(i, r, a, t, sub, part, parts);
    else if (part == 0 && live(r))
      p.end[i64(first_sample + r) * p.width[0] + first(0) + i] = a;
  }

  // this block's share of w . z to the first block
  HJEPA_DEVICE void send_energy() const {
    for (int r = thread() / 32; r < R; r += n_threads() / 32) {
      float sum[1] = {};
      for (int i = thread() % 32; i < owned(p.L - 1); i += 32) sum[0] += shared[p.wz_at + i * R + r];
      const float all = sum_over_warp(sum, 0.0f);
      if (thread() % 32 == 0) team.put(0, p.energy_at + team.rank * R + r, all);
    }
  }
  HJEPA_DEVICE void write_energy(i64 t) const {
    const int r = thread();
    if (team.rank || r >= R || !live(r)) return;
    float H = shared[p.bias_at[0]];
    for (int k = 0; k < team.size; ++k) H += team.received(p.energy_at + k * R + r);
    p.energy[i64(first_sample + r) * p.n_steps + t] = H;
  }

  // all have put layer l: pad it, exchange it
  HJEPA_DEVICE const float* gather(int l) {
    team.pad(R, p.width[l]);
    team.meet();
    return team.gathered(R, p.width[l]);
  }

  HJEPA_DEVICE void sub_step(i64 t, int sub) {
    const int L = p.L, K = L - 1;
    const float kick = p.kick[sub], drift = p.drift[sub];
    const bool with_energy = p.energy && sub == 0;
    float* const e = shared + p.e_at;
    const auto nothing = [](int, int) { return 0.0f; };
    const auto a_before = [&](int i, int r) { return shared[p.a_at + i * R + r]; };
    for (int l = 1; l < L; ++l) {
      const float* x = gather(l - 1);
      const auto bias = [&](int i, int) { return shared[p.bias_at[l] + i]; };
      dots(l - 1, x, bias, [&](int i, int r, float a, int part, int parts) {
        const int at = i * R + r;
        const float2 s = activate(p.activation, a);
        if (l < L - 1) team.put_all(r * padded(p.width[l]) + first(l) + i, s.x, part, parts);
        if (part) return;
        if (stores_layers() && live(r)) tape(r, t, sub, p.a_on_tape[l] + first(l) + i, a);
        if (l < L - 1) {
          shared[p.slope_at[l] + at] = s.y;
        } else {
          const float w = shared[p.out_at + i];
          e[at] = w * s.y;
          shared[p.wz_at + at] = w * s.x;
        }
      });
    }
    sync();
    if (with_energy) send_energy();
    if (L == 1 && with_energy) {
      team.meet();
      write_energy(t);
    }
    for (int l = L - 2; l >= 0; --l) {
      back(l, e);
      team.meet();
      if (with_energy && l == L - 2) write_energy(t);
      if (l == 0) break;
      receive(l, nothing, [&](int i, int r, float g, int part, int) {
        if (part) return;
        if (stores_layers() && live(r)) tape(r, t, sub, p.g_on_tape[l] + first(l) + i, g);
        e[i * R + r] = g * shared[p.slope_at[l] + i * R + r];
      });
      sync();
    }
    const bool last = sub == p.n_sub - 1;
    const auto move = [&](int i, int r, float g, int part, int parts) {
      const int at = i * R + r;
      const i64 row = first_sample + r;
      const float step = live(r) ? p.dt[row * p.dt_stride + t] * (g * shared[p.slope_at[0] + at]) : 0.0f;
      if (kick != 0.0f) team.put_all(r * padded(p.width[0]) + first(0) + i, -kick * step, part, parts);
      if (part) return;
      float &sq = shared[p.sq_at + at], &sp = shared[p.sp_at + at];
      if (kick != 0.0f) sp -= kick * step;
      if (drift != 0.0f) sq += e[at] = drift * step;
      if (!live(r)) return;
      if (stores_layers()) tape(r, t, sub, p.g_on_tape[0] + first(0) + i, g);
      if (!last || !(p.every_state || t == p.n_steps - 1)) return;
      const i64 to = (p.every_state ? row * p.n_steps + t : row) * p.width[0] + first(0) + i;
      p.sq[to] = sq;
      p.sp[to] = sp;
    };
    if (L > 1)
      receive(0, nothing, move);
    else
      each(0, [&](int i, int r) { move(i, r, shared[p.out_at + i], 0, 1); });

    if (kick != 0.0f)
      dots(K, gather(0), a_before, [&](int i, int r, float a, int part, int parts) {
        if (drift == 0.0f)
          arrive(i, r, a, t, sub, part, parts);
        else if (part == 0)
          shared[p.a_at + i * R + r] = a;
      });
    if (drift != 0.0f) {
      sync();
      back(K, e);
      team.meet();
      receive(0, a_before, [&](int i, int r, float a, int part, int parts) { arrive(i, r, a, t, sub, part, parts); });
    }
    if (kick == 0.0f && drift == 0.0f) {
      sync();
      each(0, [&](int i, int r) { arrive(i, r, a_before(i, r), t, sub, 0, 1); });
    }
  }

  HJEPA_DEVICE void run() {
    load();
    team.start();
    for (int group = team.index; group * R < p.B; group += team.count) {
      first_sample = group * R;
      each(0, [&](int i, int r) {
        const float a = live(r) ? p.a[i64(first_sample + r) * p.width[0] + first(0) + i] : 0.0f;
        shared[p.sq_at + i * R + r] = shared[p.sp_at + i * R + r] = 0.0f;
        enter(i, r, a, 0, 0, 0, 1);
      });
      for (i64 t = 0; t < p.n_steps; ++t)
        for (int sub = 0; sub < p.n_sub; ++sub) sub_step(t, sub);
      sync();
    }
  }
};

}  // namespace hjepa_fast::cuda
