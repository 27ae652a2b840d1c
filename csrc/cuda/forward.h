// Forward: `backends.torch.forward` without implicit or mixed sub-steps.
#pragma once

#include "blocks.h"

namespace hjepa_fast::cuda {

template <class W, int R, class Team>
struct Forward : Blocks<W, R, Team> {
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

  HJEPA_DEVICE explicit Forward(const Problem& p) : Base(p) {}

  HJEPA_DEVICE void tape(int r, i64 t, int i, int at, float v) const {
    p.tape[((i64(first_sample + r) * p.n_steps + t) * p.n_sub + i) * p.tape_width + at] = v;
  }
  HJEPA_DEVICE bool stores_layers() const { return p.tape_width > p.width[0]; }

  // a of the first layer at the point of sub-step i of step t: leaves z for the next gather
  HJEPA_DEVICE void enter(int i, int r, float a, i64 t, int sub, int part, int parts) const {
    const int at = i * R + r;
    const Derivatives s = derivatives<false>(p.activation, a);
    if (p.L > 1) team.put_all(r * padded(p.width[0]) + first(0) + i, s.s, part, parts);
    if (part) return;
    shared[p.a_at + at] = a;
    shared[p.slope_at[0] + at] = s.s1;
    if (p.L == 1) shared[p.wz_at + at] = shared[p.out_at + i] * s.s;
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

  HJEPA_DEVICE void sub_step(i64 t, int sub) {
    const int L = p.L, K = L - 1;
    const float kick = p.kick[sub], drift = p.drift[sub];
    const bool with_energy = p.energy && sub == 0;
    float* const e = shared + p.e_at;
    if (sub == 0) {
      copies_done();
      if (t + 1 < p.n_steps) fetch_step(t + 1);
    }
    const auto nothing = [](int, int) { return 0.0f; };
    const auto a_before = [&](int i, int r) { return shared[p.a_at + i * R + r]; };
    for (int l = 1; l < L; ++l) {
      const float* x = gather(l - 1);
      const auto bias = [&](int i, int) { return shared[p.bias_at[l] + i]; };
      dots(l - 1, x, bias, [&](int i, int r, float a, int part, int parts) {
        const int at = i * R + r;
        const Derivatives s = derivatives<false>(p.activation, a);
        if (l < L - 1) team.put_all(r * padded(p.width[l]) + first(l) + i, s.s, part, parts);
        if (part) return;
        if (stores_layers() && live(r)) tape(r, t, sub, p.a_on_tape[l] + first(l) + i, a);
        if (l < L - 1) {
          shared[p.slope_at[l] + at] = s.s1;
        } else {
          const float w = shared[p.out_at + i];
          e[at] = w * s.s1;
          shared[p.wz_at + at] = w * s.s;
        }
      });
    }
    sync();
    if (with_energy) send_sums(L - 1, shared + p.wz_at);
    if (L == 1 && with_energy) {
      team.meet();
      write_sums(shared[p.bias_at[0]], p.energy, t);
    }
    for (int l = L - 2; l >= 0; --l) {
      back(l, e);
      team.meet();
      if (with_energy && l == L - 2) write_sums(shared[p.bias_at[0]], p.energy, t);
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
      const float step = shared[step_place(t) + r] * (g * shared[p.slope_at[0] + at]);
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
      fetch_step(0);
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
