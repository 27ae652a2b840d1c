// The loop for few rows: the threads share the features. Weights are used as they are, row by row: a layer forward is
// dot products with rows of W, a layer back adds multiples of the same rows, so each thread touches only its share of
// every matrix. The rows of W fall into N_BLOCKS blocks whose sums are added in a fixed order, for any number of threads.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

constexpr int GROUP = 8;  // rows of W taken together

// out[g] = W[g] . x for n_rows <= GROUP rows
template <class T>
HJEPA_INLINE void group_dots(const T* W, i64 ldW, i64 n_rows, const T* x, i64 n, T* out) {
  if (n_rows < GROUP) {
    for (i64 g = 0; g < n_rows; ++g) out[g] = dot(W + g * ldW, x, n);
    return;
  }
  Vec<T> acc[GROUP] = {};
  for (i64 c = 0; c < n; c += LANES<T>) {
    const Vec<T> xc = load(x + c);
#pragma GCC unroll 8
    for (int g = 0; g < GROUP; ++g) acc[g] += load(W + g * ldW + c) * xc;
  }
#pragma GCC unroll 8
  for (int g = 0; g < GROUP; ++g) out[g] = sum<T>(acc[g]);
}

// y += sum_g e[g] W[g]
template <class T>
HJEPA_INLINE void add_group(const T* W, i64 ldW, i64 n_rows, const T* e, i64 n, T* y) {
  if (n_rows < GROUP) {
    for (i64 g = 0; g < n_rows; ++g)
      for (i64 c = 0; c < n; c += LANES<T>) store(y + c, load(y + c) + e[g] * load(W + g * ldW + c));
    return;
  }
  for (i64 c = 0; c < n; c += LANES<T>) {
    Vec<T> even = load(y + c), odd = {};
#pragma GCC unroll 8
    for (int g = 0; g < GROUP; g += 2) {
      even += e[g] * load(W + g * ldW + c);
      odd += e[g + 1] * load(W + (g + 1) * ldW + c);
    }
    store(y + c, even + odd);
  }
}

// What the threads exchange. Buffers that one barrier separates from their next use come in pairs.
template <class T>
struct Shared {
  T *z[MAX_LAYERS], *d[MAX_LAYERS];
  T *partial[2], *H[2], *moved[2];
  T* a;  // where those who join start from
  i64 widest = 0;

  Shared(const Problem<T>& p, Pieces<T>& pieces) {
    for (int l = 0; l < p.L; ++l) {
      widest = ld<T>(p.width[l]) > widest ? ld<T>(p.width[l]) : widest;
      z[l] = pieces.take(p.B * ld<T>(p.width[l]));
      d[l] = pieces.take(p.B * ld<T>(p.width[l]));
    }
    for (int i = 0; i < 2; ++i) {
      partial[i] = pieces.take(N_BLOCKS * p.B * widest);
      H[i] = pieces.take(N_BLOCKS * p.B);
      moved[i] = pieces.take(p.B * ld<T>(p.width[0]));
    }
    a = pieces.take(p.B * ld<T>(p.width[0]));
  }
};

template <class T>
struct FeatureThread {
  const Problem<T>& p;
  const Shared<T>& shared;
  Barrier* barrier;
  int thread, n_threads;  // n_threads: 1 until the others have joined
  int flip = 0;
  i64 B, h, w, padded;
  T *a, *z, *d, *step, *sq, *sp;  // this thread's own copies; the threads compute the same numbers
  T *a_group, *z_group, *d_group;

  FeatureThread(const Problem<T>& p, const Shared<T>& shared, Barrier* barrier, int thread, int n_threads, Pieces<T>& pieces)
      : p(p), shared(shared), barrier(barrier), thread(thread), n_threads(n_threads), B(p.B), h(p.width[0]), w(ld<T>(h)),
        padded(round_up(h, LANES<T>)) {
    for (T** x : {&a, &z, &d, &step, &sq, &sp}) {
      *x = pieces.take(B * w);
      if (pieces.base) clear(*x, B * w);
    }
    for (T** x : {&a_group, &z_group, &d_group}) *x = pieces.take(round_up(B * GROUP, LANES<T>));
    if (pieces.base) clear(a_group, round_up(B * GROUP, LANES<T>));
  }

  // f(block, row, n_rows) for the groups of this thread's share of n rows. Every other sweep over a matrix goes
  // backwards, to find in the cache what the one before it read last.
  template <class F>
  HJEPA_INLINE void over_groups(i64 n, bool backwards, F f) {
    const i64 groups = (n + GROUP - 1) / GROUP;
    const int first = N_BLOCKS * thread / n_threads, last = N_BLOCKS * (thread + 1) / n_threads;
    for (int i = first; i < last; ++i) {
      const int block = backwards ? first + last - 1 - i : i;
      const i64 from = groups * block / N_BLOCKS, to = groups * (block + 1) / N_BLOCKS;
      for (i64 j = from; j < to; ++j) {
        const i64 row = GROUP * (backwards ? from + to - 1 - j : j);
        f(block, row, n - row < GROUP ? n - row : GROUP);
      }
    }
  }

  void meet() {
    if (n_threads > 1) wait(*barrier);
  }

  T* partial(i64 block, i64 b) { return shared.partial[flip] + (block * B + b) * shared.widest; }

  void clear_partials(i64 n) {
    const int first = N_BLOCKS * thread / n_threads, last = N_BLOCKS * (thread + 1) / n_threads;
    for (i64 block = first; block < last; ++block)
      for (i64 b = 0; b < B; ++b) clear(partial(block, b), n);
  }

  Vec<T> sum_partials(i64 b, i64 c) {
    Vec<T> s = load(partial(0, b) + c);
    for (int block = 1; block < N_BLOCKS; ++block) s += load(partial(block, b) + c);
    return s;
  }

  // step <- delta at a; the energies H [B, strided] if not null; the tape's row of every sample if not null
  void evaluate(T* H, T* tape, i64 strideT) {
    const int last = p.L - 1;
    const T* w_out = p.W[last];
    for (i64 b = 0; b < B; ++b) activate<T>(p.activation[0], a + b * w, z + b * w, d + b * w, padded);
    if (tape && thread == 0) copy_rows(tape, strideT, a, w, B, h);
    i64 at = h;
    for (int l = 0; l < last; ++l) {
      const bool to_last = l + 1 == last;
      const i64 n = p.width[l], m = p.width[l + 1], ldW = p.ldW[l], ldz = ld<T>(n), ldm = ld<T>(m);
      const i64 n_padded = round_up(n, LANES<T>);
      const T* x = l ? shared.z[l] : z;
      if (to_last) {
        clear_partials(n_padded);
        for (i64 i = 0; i < N_BLOCKS * B; ++i)
          if (i / B >= N_BLOCKS * thread / n_threads && i / B < N_BLOCKS * (thread + 1) / n_threads) shared.H[flip][i] = 0;
      }
      over_groups(m, false, [&](i64 block, i64 row, i64 n_rows) {
        const T* W = p.W[l] + row * ldW;
        for (i64 b = 0; b < B; ++b) {
          T* ab = a_group + b * GROUP;
          group_dots(W, ldW, n_rows, x + b * ldz, n_padded, ab);
          for (i64 g = 0; g < n_rows; ++g) ab[g] += p.b[l][row + g];
          if (tape && p.tape_layers) copy_rows(tape + b * strideT + at + row, 0, ab, 0, 1, n_rows);
        }
        activate<T>(p.activation[l + 1], a_group, z_group, d_group, round_up(B * GROUP, LANES<T>));
        for (i64 b = 0; b < B; ++b) {
          T *zb = z_group + b * GROUP, *db = d_group + b * GROUP;
          if (to_last) {
            for (i64 g = 0; g < n_rows; ++g) {
              shared.H[flip][block * B + b] += zb[g] * w_out[row + g];
              db[g] *= w_out[row + g];
            }
            add_group(W, ldW, n_rows, db, n_padded, partial(block, b));
          } else {
            copy_rows(shared.z[l + 1] + b * ldm + row, 0, zb, 0, 1, n_rows);
            copy_rows(shared.d[l + 1] + b * ldm + row, 0, db, 0, 1, n_rows);
          }
        }
      });
      meet();
      at += m;
    }
    if (H && thread == 0)
      for (i64 b = 0; b < B; ++b) {
        T s = last ? T(0) : dot(z + b * w, w_out, h);
        for (int block = 0; last && block < N_BLOCKS; ++block) s += shared.H[flip][block * B + b];
        H[b * p.n_steps] = s + p.b[last][0];
      }
    // at: where g_1 is kept, then g_2, ...
    for (int l = last - 1; l >= 1; --l) {
      const i64 n = p.width[l - 1], m = p.width[l], ldW = p.ldW[l - 1], n_padded = round_up(n, LANES<T>);
      i64 at_g = at;
      for (int i = 0; i < l; ++i) at_g += p.width[i];
      const int from = flip, to = 1 - flip;
      flip = to;
      clear_partials(n_padded);
      over_groups(m, true, [&](i64 block, i64 row, i64 n_rows) {
        for (i64 b = 0; b < B; ++b) {
          T e[GROUP];
          for (i64 g = 0; g < n_rows; ++g) {
            T sum = 0;
            for (int k = 0; k < N_BLOCKS; ++k) sum += shared.partial[from][(k * B + b) * shared.widest + row + g];
            if (tape && p.tape_layers) tape[b * strideT + at_g + row + g] = sum;
            e[g] = sum * shared.d[l][b * ld<T>(m) + row + g];
          }
          add_group(p.W[l - 1] + row * ldW, ldW, n_rows, e, n_padded, partial(block, b));
        }
      });
      meet();
    }
    for (i64 b = 0; b < B; ++b)
      for (i64 c = 0; c < padded; c += LANES<T>) {
        const Vec<T> g = last ? sum_partials(b, c) : load(w_out + c);
        store(step + b * w + c, g * load(d + b * w + c));
        if (tape && p.tape_layers && last && thread == 0)
          for (i64 i = c; i < c + LANES<T> && i < h; ++i) tape[b * strideT + at + i] = g[i - c];
      }
    if (last) flip = 1 - flip;
  }

  void run(int all_threads) {
    const i64 state = p.n_kept * h, first = p.n_kept > 1 ? (p.begin - 1) * h : 0;
    i64 begin = p.begin;
    if (thread) {
      join(*barrier, begin, flip);
      n_threads = all_threads;
      __builtin_memcpy(a, shared.a, B * w * sizeof(T));
    } else {
      n_threads = 1;
      copy_rows(a, w, p.a, h, B, h);
      if (begin) {
        copy_rows(sq, w, p.sq + first, state, B, h);
        copy_rows(sp, w, p.sp + first, state, B, h);
      }
    }
    const i64 strideT = p.n_steps * p.n_sub * p.tape_width;
    for (i64 t = begin; t < p.end; ++t) {
      if (n_threads < all_threads && all_here(*barrier, t == begin)) {
        n_threads = all_threads;
        __builtin_memcpy(shared.a, a, B * w * sizeof(T));
        call_in(*barrier, t, flip);
      }
      for (int i = 0; i < p.n_sub; ++i) {
        const SubStep<T> s(p, i);
        const T kick = s.kick, drift = s.drift;
        evaluate(i == 0 && p.energy ? p.energy + t : nullptr,
                 p.tape_width ? p.tape + (t * p.n_sub + i) * p.tape_width : nullptr, strideT);
        for (i64 b = 0; b < B; ++b) {
          const T dt = p.dt[b * p.dt_stride + t];
          for (i64 c = b * w; c < b * w + padded; c += LANES<T>) {
            const Vec<T> moved = dt * load(step + c);
            store(step + c, moved);
            if (kick) store(sp + c, load(sp + c) - kick * moved);
            if (drift) store(sq + c, load(sq + c) + drift * moved);
          }
        }
        if (drift) clear_partials(padded);
        // K itself from alternating ends: 8 % off the loop at batch 1, measured on two cores with 1 MiB of L2 each
        over_groups(h, (t * p.n_sub + i) % 2, [&](i64 block, i64 row, i64 n_rows) {
          const T* K = p.K + row * p.ldK;
          for (i64 b = 0; b < B; ++b) {
            if (kick) {
              T moved[GROUP];
              group_dots(K, p.ldK, n_rows, step + b * w, padded, moved);
              copy_rows(shared.moved[flip] + b * w + row, 0, moved, 0, 1, n_rows);
            }
            if (drift) add_group(K, p.ldK, n_rows, step + b * w + row, padded, partial(block, b));
          }
        });
        const bool end_of_step = i + 1 == p.n_sub;
        if (thread == 0 && n_threads > 1 && end_of_step) dismiss_if_slow(*barrier, t);
        meet();
        const bool leaving = n_threads > 1 && end_of_step && dismissed(*barrier, t);
        if (leaving && thread) return;
        for (i64 b = 0; b < B; ++b)
          for (i64 c = 0; c < padded; c += LANES<T>) {
            Vec<T> x = load(a + b * w + c);
            if (kick) x -= kick * load(shared.moved[flip] + b * w + c);
            if (drift) x += drift * sum_partials(b, c);
            store(a + b * w + c, x);
          }
        flip = 1 - flip;
        if (leaving) n_threads = all_threads = 1;
      }
      if (thread == 0 && (p.n_kept > 1 || t + 1 == p.end)) {
        const i64 to = p.n_kept > 1 ? t * h : 0;
        copy_rows(p.sq + to, state, sq, w, B, h);
        copy_rows(p.sp + to, state, sp, w, B, h);
      }
    }
    if (thread == 0) copy_rows(p.a, h, a, w, B, h);
    if (n_threads < all_threads) call_in(*barrier, p.end, flip);
  }
};

template <class T>
i64 shared_scratch(const Problem<T>& p) {
  Pieces<T> pieces{nullptr};
  Shared<T> shared(p, pieces);
  return pieces.used;
}

template <class T>
void forward_features(const Problem<T>& p, int thread, int n_threads, Barrier& barrier, T* shared_base, T* scratch) {
  Pieces<T> shared_pieces{shared_base}, pieces{scratch};
  const Shared<T> shared(p, shared_pieces);
  FeatureThread<T> features(p, shared, &barrier, thread, n_threads, pieces);
  features.run(n_threads);
}

template <class T>
i64 thread_scratch(const Problem<T>& p) {
  Pieces<T> shared_pieces{nullptr}, pieces{nullptr};
  const Shared<T> shared(p, shared_pieces);
  FeatureThread<T> features(p, shared, nullptr, 0, 1, pieces);
  return pieces.used;
}

}  // namespace hjepa_fast::HJEPA_ISA
