// Back: the adjoint of forward.h, `backends.torch.backward`, from a tape that has every layer. The gradients of the weights
// are sums of products over all sub-steps and samples; their factors are left in device memory for the caller to multiply.
#pragma once

#include "blocks.h"

namespace hjepa_fast::cuda {

template <class W, int R, class Team>
struct Backward : Blocks<W, R, Team> {
  using Base = Blocks<W, R, Team>;
  using Base::back;
  using Base::dots;
  using Base::each;
  using Base::first;
  using Base::first_sample;
  using Base::gather;
  using Base::live;
  using Base::load;
  using Base::p;
  using Base::receive;
  using Base::send_sums;
  using Base::shared;
  using Base::team;
  using Base::write_sums;

  HJEPA_DEVICE explicit Backward(const Problem& p) : Base(p) {}

  // of sub-step `sub` of step t, where feature `at` of a sample's tape or factors is
  HJEPA_DEVICE const float* tape(int r, i64 t, int sub, int at) const {
    return p.tape + ((i64(first_sample + r) * p.tape_steps + t - p.tape_begin) * p.n_sub + sub) * p.tape_width + at;
  }
  HJEPA_DEVICE float saved(int r, i64 t, int sub, int at) const { return live(r) ? *tape(r, t, sub, at) : 0.0f; }
  HJEPA_DEVICE void factor(int r, i64 t, int sub, int at, float v) const {
    if (!p.factors || !live(r)) return;
    p.factors[((sub * (p.end_step - p.begin_step) + t - p.begin_step) * p.B + first_sample + r) * p.factors_width + at] = v;
  }

  // what the sub-step before this one will read, while there is time
  HJEPA_DEVICE void fetch_ahead(i64 t, int sub) const {
    if (--sub < 0) sub = p.n_sub - 1, --t;
    if (t < p.begin_step) return;
    constexpr int LINE = 32;
    for (int l = 0; l < p.L; ++l)
      for (int k = thread(); k < 2 * R; k += n_threads()) {
        const int r = k / 2, from = k % 2 ? p.g_on_tape[l] : p.a_on_tape[l];
        if (!live(r) || (k % 2 && l == p.L - 1)) continue;
        for (int i = 0; i < this->owned(l); i += LINE) prefetch(tape(r, t, sub, from + first(l) + i));
      }
  }

  HJEPA_DEVICE float energy_cotangent(int r, i64 t, int sub) const {
    return p.gE && sub == 0 && live(r) ? p.gE[i64(first_sample + r) * p.n_steps + t] : 0.0f;
  }

  // u, the cotangent of delta but for dt, is known: the tangent goes up from here
  HJEPA_DEVICE void enter(int i, int r, float u, i64 t, int sub, int part, int parts) const {
    const int at = i * R + r, f = first(0) + i, L = p.L;
    const float dt = live(r) ? p.dt[i64(first_sample + r) * p.dt_stride + t] : 0.0f, v = dt * u;
    const Derivatives s = derivatives<true>(p.activation, saved(r, t, sub, p.a_on_tape[0] + f));
    const float g = L > 1 ? saved(r, t, sub, p.g_on_tape[0] + f) : shared[p.out_at + i];
    if (L > 1) this->team.put_all(r * padded(p.width[0]) + f, s.s1 * v, part, parts);
    if (part) return;
    float &la = shared[p.a_at + at], &udelta = shared[p.udelta_at + at];
    udelta = (sub == p.n_sub - 1 ? 0.0f : udelta) + u * (g * s.s1);
    factor(r, t, sub, f, la);
    factor(r, t, sub, p.step_factor + f, dt * (g * s.s1));
    if (L > 1) {
      shared[p.slope_at[0] + at] = s.s1;
      shared[p.curve_at[0] + at] = g * s.s2 * v;
      factor(r, t, sub, p.z_factor[0] + f, s.s);
      factor(r, t, sub, p.zd_factor[0] + f, s.s1 * v);
    } else {
      const float gE = energy_cotangent(r, t, sub);
      la += g * (s.s2 * v + gE * s.s1);
      factor(r, t, sub, p.top_factor + f, s.s1 * v + gE * s.s);
    }
  }

  HJEPA_DEVICE void sub_step(i64 t, int sub) {
    const int L = p.L, K = L - 1;
    const float kick = p.kick[sub], drift = p.drift[sub];
    float *const e = shared + p.e_at, *const la = shared + p.a_at, *const us = shared + p.u_at;
    const auto nothing = [](int, int) { return 0.0f; };
    fetch_ahead(t, sub);
    if (p.gsq && sub == p.n_sub - 1)
      each(0, [&](int i, int r) {
        if (!live(r)) return;
        const i64 from = (i64(first_sample + r) * p.n_steps + t) * p.width[0] + first(0) + i;
        shared[p.sq_at + i * R + r] += p.gsq[from];
        shared[p.sp_at + i * R + r] += p.gsp[from];
      });
    sync();
    if (drift != 0.0f) {
      each(0, [&](int i, int r) { team.put_all(r * padded(p.width[0]) + first(0) + i, la[i * R + r], 0, 1); });
      const auto lsq = [&](int i, int r) { return shared[p.sq_at + i * R + r]; };
      dots(K, gather(0), lsq, [&](int i, int r, float sum, int part, int parts) {
        if (kick == 0.0f)
          enter(i, r, drift * sum, t, sub, part, parts);
        else if (part == 0)
          us[i * R + r] = drift * sum;
      });
    }
    if (kick != 0.0f) {
      back(K, la);
      team.meet();
      const auto lsp = [&](int i, int r) { return shared[p.sp_at + i * R + r]; };
      receive(0, lsp, [&](int i, int r, float sum, int part, int parts) {
        enter(i, r, (drift != 0.0f ? us[i * R + r] : 0.0f) - kick * sum, t, sub, part, parts);
      });
    }
    if (kick == 0.0f && drift == 0.0f) each(0, [&](int i, int r) { enter(i, r, 0.0f, t, sub, 0, 1); });
    if (sub == 0) {
      sync();
      send_sums(0, shared + p.udelta_at);
      if (L == 1) {
        team.meet();
        write_sums(0.0f, p.gdt, t);
      }
    }
    for (int l = 1; l < L; ++l) {
      const float* x = gather(l - 1);
      if (sub == 0 && l == 1) write_sums(0.0f, p.gdt, t);
      dots(l - 1, x, nothing, [&](int i, int r, float ad, int part, int parts) {
        const int at = i * R + r, f = first(l) + i;
        const Derivatives s = derivatives<true>(p.activation, saved(r, t, sub, p.a_on_tape[l] + f));
        const float g = l < L - 1 ? saved(r, t, sub, p.g_on_tape[l] + f) : shared[p.out_at + i];
        if (l < L - 1) team.put_all(r * padded(p.width[l]) + f, s.s1 * ad, part, parts);
        if (part) return;
        factor(r, t, sub, p.e_factor[l] + f, g * s.s1);
        if (l < L - 1) {
          shared[p.slope_at[l] + at] = s.s1;
          shared[p.curve_at[l] + at] = g * s.s2 * ad;
          factor(r, t, sub, p.z_factor[l] + f, s.s);
          factor(r, t, sub, p.zd_factor[l] + f, s.s1 * ad);
        } else {
          const float gE = energy_cotangent(r, t, sub);
          e[at] = g * (s.s2 * ad + gE * s.s1);
          factor(r, t, sub, p.r_factor[l] + f, e[at]);
          factor(r, t, sub, p.top_factor + f, s.s1 * ad + gE * s.s);
        }
      });
    }
    for (int l = L - 2; l >= 0; --l) {
      sync();
      back(l, e);
      team.meet();
      receive(l, nothing, [&](int i, int r, float sum, int part, int) {
        if (part) return;
        const int at = i * R + r;
        const float rl = sum * shared[p.slope_at[l] + at] + shared[p.curve_at[l] + at];
        if (l == 0) {
          la[at] += rl;
        } else {
          e[at] = rl;
          factor(r, t, sub, p.r_factor[l] + first(l) + i, rl);
        }
      });
    }
  }

  HJEPA_DEVICE void run() {
    load();
    team.start();
    for (int group = team.index; group * R < p.B; group += team.count) {
      first_sample = group * R;
      // la, lsq, lsp and where they are
      const auto own = [&](int i, int r, auto f) {
        const i64 at = i64(first_sample + r) * p.width[0] + first(0) + i;
        f(p.la, at, shared[p.a_at + i * R + r]);
        f(p.lsq, at, shared[p.sq_at + i * R + r]);
        f(p.lsp, at, shared[p.sp_at + i * R + r]);
      };
      each(0, [&](int i, int r) {
        own(i, r, [&](const float* from, i64 at, float& mine) { mine = live(r) ? from[at] : 0.0f; });
      });
      for (i64 t = p.end_step - 1; t >= p.begin_step; --t)
        for (int sub = p.n_sub - 1; sub >= 0; --sub) sub_step(t, sub);
      sync();
      each(0, [&](int i, int r) {
        if (live(r)) own(i, r, [](float* to, i64 at, float& mine) { to[at] = mine; });
      });
    }
  }
};

}  // namespace hjepa_fast::cuda
