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
  using Base::fetch_step;
  using Base::first_sample;
  using Base::gather;
  using Base::live;
  using Base::load;
  using Base::p;
  using Base::receive;
  using Base::send_sums;
  using Base::shared;
  using Base::step_place;
  using Base::team;
  using Base::write_sums;

  HJEPA_DEVICE explicit Backward(const Problem& p) : Base(p) {}

  int now = 0;  // which of the two copies of the tape is read

  // the tape of a sub-step to shared memory, while there is time; see `fetch_step`
  HJEPA_DEVICE void fetch_tape(i64 t, int sub, int which) const {
    for (int l = 0; l < p.L; ++l)
      each(l, [&](int i, int r) {
        float* const to = shared + p.tape_at[which] + p.saved_at[l] + i * R + r;
        if (!live(r)) {
          to[0] = to[p.share[l] * R] = 0.0f;
          return;
        }
        const i64 at = (i64(first_sample + r) * p.tape_steps + t - p.tape_begin) * p.n_sub + sub;
        const float* const from = p.tape + at * p.tape_width + first(l) + i;
        copy_async(to, from + p.a_on_tape[l]);
        if (l < p.L - 1) copy_async(to + p.share[l] * R, from + p.g_on_tape[l]);
      });
  }
  // a and g of layer l, number `at` of this block's own
  HJEPA_DEVICE float saved_a(int l, int at) const { return shared[p.tape_at[now] + p.saved_at[l] + at]; }
  HJEPA_DEVICE float saved_g(int l, int at) const {
    return l < p.L - 1 ? saved_a(l, p.share[l] * R + at) : shared[p.out_at + at / R];
  }

  HJEPA_DEVICE void factor(int r, i64 t, int sub, int at, float v) const {
    if (!p.factors || !live(r)) return;
    p.factors[((sub * (p.end_step - p.begin_step) + t - p.begin_step) * p.B + first_sample + r) * p.factors_width + at] = v;
  }

  HJEPA_DEVICE float energy_cotangent(int r, i64 t, int sub) const {
    return sub == 0 ? shared[step_place(t) + R + r] : 0.0f;
  }

  // u, the cotangent of delta but for dt, is known: the tangent goes up from here
  HJEPA_DEVICE void enter(int i, int r, float u, i64 t, int sub, int part, int parts) const {
    const int at = i * R + r, f = first(0) + i, L = p.L;
    const float dt = shared[step_place(t) + r], v = dt * u, g = saved_g(0, at);
    const Derivatives s = derivatives<true>(p.activation, saved_a(0, at));
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
    if (p.gsq && sub == p.n_sub - 1)
      each(0, [&](int i, int r) {
        if (!live(r)) return;
        const i64 from = (i64(first_sample + r) * p.n_steps + t) * p.width[0] + first(0) + i;
        shared[p.sq_at + i * R + r] += p.gsq[from];
        shared[p.sp_at + i * R + r] += p.gsp[from];
      });
    copies_done();
    sync();
    const int before = sub ? sub - 1 : p.n_sub - 1;
    if (sub == p.n_sub - 1 && t > p.begin_step) fetch_step(t - 1);
    if (sub || t > p.begin_step) fetch_tape(sub ? t : t - 1, before, 1 - now);
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
        const Derivatives s = derivatives<true>(p.activation, saved_a(l, at));
        const float g = saved_g(l, at);
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
    now = 1 - now;
  }

  HJEPA_DEVICE void run() {
    load();
    team.start();
    for (int group = team.index; group * R < p.B; group += team.count) {
      first_sample = group * R;
      fetch_step(p.end_step - 1);
      fetch_tape(p.end_step - 1, p.n_sub - 1, now);
      // la, lsq, lsp and where they are
      const auto own = [&](int i, int r, auto f) {
        const i64 at = i64(first_sample + r) * p.width[0] + first(0) + i;
        f(p.la, p.la_before, at, shared[p.a_at + i * R + r]);
        f(p.lsq, p.lsq_before, at, shared[p.sq_at + i * R + r]);
        f(p.lsp, p.lsp_before, at, shared[p.sp_at + i * R + r]);
      };
      each(0, [&](int i, int r) {
        own(i, r, [&](const float* from, float*, i64 at, float& mine) { mine = live(r) ? from[at] : 0.0f; });
      });
      for (i64 t = p.end_step - 1; t >= p.begin_step; --t)
        for (int sub = p.n_sub - 1; sub >= 0; --sub) sub_step(t, sub);
      sync();
      each(0, [&](int i, int r) {
        if (live(r)) own(i, r, [](const float*, float* to, i64 at, float& mine) { to[at] = mine; });
      });
    }
  }
};

}  // namespace hjepa_fast::cuda
