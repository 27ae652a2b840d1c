// What one launch computes, as plain pointers and places: filled in on the host, passed by value to the kernel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define HJEPA_BOTH __host__ __device__
#else
#define HJEPA_BOTH
#endif

namespace hjepa_fast::cuda {

using i64 = std::int64_t;

constexpr int MAX_LAYERS = 8, MAX_SUB_STEPS = 32, MOST_ROWS = 8, MAX_THREADS = 256;

enum Kind : int { SOFTPLUS, TANH, SILU, GELU, GELU_TANH, SIN };

// Whether a counter, which begins anew after its largest number, has come to `value`.
HJEPA_BOTH constexpr bool reached(unsigned seen, unsigned value) { return int(seen - value) >= 0; }

struct Activation {
  int kind;
  float beta, threshold;
};

// Matrices have rows of whole 16-byte pieces in both dtypes, the rest zeros.
HJEPA_BOTH constexpr int padded(int n) { return (n + 7) / 8 * 8; }

// Layers l = 1..L in the mathematics are indices 0..L-1 here.
//
// A team of blocks takes `rows` samples at a time through all their steps. Each block owns `share[l]` features of every
// layer, and of every matrix the rows that lead to them; it computes with these alone, in both directions.
struct Problem {
  int L, width[MAX_LAYERS];
  Activation activation;
  // [0..L-2]: W from layer l to l + 1, [width[l + 1], padded(width[l])]; [L-1]: K [h, padded(h)]
  const void* matrix[MAX_LAYERS];
  const float* vectors;  // the biases of layers 1..L-1, that of H, the output weights w
  int B, n_sub;
  i64 n_steps;
  float kick[MAX_SUB_STEPS], drift[MAX_SUB_STEPS];
  const float* dt;  // [1 or B, n_steps]
  i64 dt_stride, dt_step;
  bool every_state;
  int tape_width;     // numbers of a sub-step and sample: none, h, or all a_l and g_l
  const float* a;     // [B, h]
  float *end, *sq, *sp, *energy, *tape;  // [B, h], [B, n_steps or 1, h] twice, [B, n_steps] or null, [B, n_steps, n_sub, *]

  // back: cotangents [B, h] after the steps and before them, which may be the same; of dt [B, n_steps] out, of sq and sp after
  // every step [B, n_steps, h] and of the energies [B, n_steps], or null; steps begin_step..end_step-1, the last one first,
  // from a tape that starts at tape_begin
  bool back;
  const float *la, *lsq, *lsp;
  float *la_before, *lsq_before, *lsp_before, *gdt;
  const float *gsq, *gsp, *gE;
  i64 begin_step, end_step, tape_begin, tape_steps;
  // [n_sub, steps, B, factors_width], or null: side by side la, dt delta; of every layer but the last z, zd, and e of the
  // next; r of every layer but the first; the output weights' gradient
  float* factors;
  int factors_width, step_factor, top_factor, z_factor[MAX_LAYERS], zd_factor[MAX_LAYERS], e_factor[MAX_LAYERS],
      r_factor[MAX_LAYERS];

  // how it is shared out
  int rows, team, n_teams;
  int share[MAX_LAYERS];  // features of a block, even
  int parts[MAX_LAYERS];  // lanes that add up one number of this layer
  int a_on_tape[MAX_LAYERS], g_on_tape[MAX_LAYERS], bias[MAX_LAYERS], out;  // places in the tape and in `vectors`
  // a buffer of the exchange, in floats: what blocks send each other between two barriers. Twice in each block's shared
  // memory; or, of a team on a grid, one for every block and one for all, and these twice, in `exchange`
  int buffer_size, sums_at;
  float* exchange;
  unsigned* flags;  // [n_teams, team]: how often a block has come to the barrier
  // places in shared memory, in floats
  int matrix_at[MAX_LAYERS];  // -1: read from global memory
  int bias_at[MAX_LAYERS], slope_at[MAX_LAYERS], out_at, a_at, sq_at, sp_at, e_at, wz_at, step_at, buffer_at, shared_size;
  int curve_at[MAX_LAYERS], u_at, udelta_at, tape_at[2], saved_at[MAX_LAYERS];  // back; there a, sq, sp are la, lsq, lsp

  HJEPA_BOTH int columns(int j) const { return width[j < L - 1 ? j : 0]; }
  // the layer whose features are the rows of matrix j
  HJEPA_BOTH int target(int j) const { return j < L - 1 ? j + 1 : 0; }
};

// Fills in how p is shared out, or returns false if that needs more than `most_shared` bytes of shared memory. A matrix
// that does not fit stays where it is; W goes before K because a gradient uses it twice.
inline bool lay_out(Problem& p, int rows, int team, int n_teams, int n_threads, bool cluster, std::size_t element,
                    std::size_t most_shared) {
  p.rows = rows;
  p.team = team;
  p.n_teams = n_teams;
  int widest = 0, received = 0, on_tape = 0;
  for (int l = 0; l < p.L; ++l) {
    p.share[l] = 2 * ((p.width[l] + 2 * team - 1) / (2 * team));
    p.parts[l] = 1;
    while (p.parts[l] < 32 && p.parts[l] < team && 2 * p.parts[l] * p.share[l] * rows <= n_threads) p.parts[l] *= 2;
    widest = std::max(widest, padded(p.width[l]));
    received = std::max(received, team * (rows * p.share[l] + 4));
    p.a_on_tape[l] = on_tape;
    on_tape += p.width[l];
  }
  for (int l = 0; l < p.L; ++l) {
    p.g_on_tape[l] = on_tape;
    on_tape += p.width[l];
  }
  int vectors = 0;
  for (int l = 1; l < p.L; ++l) {
    p.bias[l] = vectors;
    vectors += p.width[l];
  }
  p.bias[0] = vectors;  // of H
  p.out = vectors + 1;
  int factors = 0;
  const auto factor = [&](int l) {
    const int at = factors;
    factors += p.width[l];
    return at;
  };
  factor(0);
  p.step_factor = factor(0);
  for (int l = 0; l + 1 < p.L; ++l) {
    p.z_factor[l] = factor(l);
    p.zd_factor[l] = factor(l);
    p.e_factor[l + 1] = factor(l + 1);
  }
  for (int l = 1; l < p.L; ++l) p.r_factor[l] = factor(l);
  p.top_factor = factor(p.L - 1);
  p.factors_width = factors;
  p.sums_at = (std::max(rows * widest, received) + 3) / 4 * 4;
  p.buffer_size = p.sums_at + (team * rows + 3) / 4 * 4;

  int used = 0;
  const auto take = [&](int n) {
    const int at = used;
    used += (n + 3) / 4 * 4;
    return at;
  };
  const int last = p.share[p.L - 1], most = *std::max_element(p.share, p.share + p.L);
  for (int l = 0; l < p.L; ++l) p.bias_at[l] = take(l ? p.share[l] : 1);
  for (int l = 0; l < p.L; ++l) p.slope_at[l] = take(p.share[l] * rows);
  p.out_at = take(last);
  p.a_at = take(p.share[0] * rows);
  p.sq_at = take(p.share[0] * rows);
  p.sp_at = take(p.share[0] * rows);
  p.e_at = take(most * rows);
  p.wz_at = take(last * rows);
  p.step_at = take(4 * rows);
  if (p.back) {
    for (int l = 0; l < p.L; ++l) p.curve_at[l] = take(p.share[l] * rows);
    p.u_at = take(p.share[0] * rows);
    p.udelta_at = take(p.share[0] * rows);
    int saved = 0;
    for (int l = 0; l < p.L; ++l) {
      p.saved_at[l] = saved;
      saved += 2 * p.share[l] * rows;
    }
    for (int& at : p.tape_at) at = take(saved);
  }
  p.buffer_at = take(cluster ? 2 * p.buffer_size : rows * widest);
  if (used * sizeof(float) > most_shared) return false;
  for (int j = 0; j < p.L; ++j) {
    const i64 n = i64(p.share[p.target(j)]) * padded(p.columns(j)) * i64(element) / i64(sizeof(float));
    const bool fits = (used + n) * i64(sizeof(float)) <= i64(most_shared);
    p.matrix_at[j] = fits ? take(int(n)) : -1;
  }
  p.shared_size = used;
  return true;
}

// Floats of `exchange` and numbers of `flags` that a grid needs.
inline i64 exchange_size(const Problem& p) { return i64(p.n_teams) * 2 * (p.team + 1) * p.buffer_size; }
inline i64 flags_size(const Problem& p) { return i64(p.n_teams) * p.team; }

}  // namespace hjepa_fast::cuda
