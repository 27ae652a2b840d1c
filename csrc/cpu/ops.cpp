// The operators hjepa_fast_cpp::forward and backward: they fill in a Problem, pick the kernels for the processor, divide
// the work among threads. Every tensor is contiguous and made by the caller (hjepa_fast/backends/cpp.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#if defined(__unix__)
#include <sys/mman.h>
#endif

#include "pool.h"
#include "problem.h"

namespace hjepa_fast {

extern const Kernels<float> generic_float;
extern const Kernels<double> generic_double;
#if defined(__x86_64__)
extern const Kernels<float> avx2_float, avx512_float, avx512bf16_float;
extern const Kernels<double> avx2_double, avx512_double;
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Isa : i64 { GENERIC, AVX2, AVX512, AVX512_BF16 };
enum Path : i64 { CHOOSE, ROWS, FEATURES, CREW };

i64 supported_isa() {
#if defined(__x86_64__)
  static const i64 best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? (__builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512) : avx2 ? AVX2 : GENERIC;
  }();
  return best;
#else
  return GENERIC;
#endif
}

// The fastest of these. On an Intel processor products of bfloat16 were measured at half the rate of float32 ones, on an AMD
// processor the loop ran faster with them.
i64 best_isa() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
  return std::min<i64>(supported_isa(), intel ? AVX512 : AVX512_BF16);
#else
  return supported_isa();
#endif
}

// isa: at most this, or the fastest if negative
template <class T>
const Kernels<T>& kernels_for(i64 isa, bool bf16) {
  isa = isa < 0 ? best_isa() : std::min(isa, supported_isa());
  constexpr bool is_float = std::is_same_v<T, float>;
#if defined(__x86_64__)
  if constexpr (is_float) {
    if (isa == AVX512_BF16 && bf16) return avx512bf16_float;
    if (isa >= AVX512) return avx512_float;
    if (isa == AVX2) return avx2_float;
  } else {
    if (isa >= AVX512) return avx512_double;
    if (isa == AVX2) return avx2_double;
  }
#endif
  if constexpr (is_float)
    return generic_float;
  else
    return generic_double;
}

// What is no number of the problem: threads, then bits from 16 on: instruction set + 1 (8), path (8), and one each for bfloat16
// products, every layer on the tape, the path after every step, sums that hold nothing yet.
struct Options {
  i64 bits;
  i64 n_threads() const { return bits & 0xffff; }
  i64 isa() const { return (bits >> 16 & 0xff) - 1; }
  i64 path() const { return bits >> 24 & 0xff; }
  bool bf16() const { return bits >> 32 & 1; }
  bool layers() const { return bits >> 33 & 1; }
  bool every() const { return bits >> 34 & 1; }
  bool fresh() const { return bits >> 35 & 1; }
};

// parameters: K, weights, biases. numbers: of each layer's activation its kind, beta and threshold; tolerance, most evaluations; the
// scheme, four for each sub-step.
#define DENSE_ARGUMENTS "Tensor[] parameters, Tensor dt, Tensor numbers, int begin, int end, int options) -> ()"

struct Arguments {
  const Tensor &K, &dt, &numbers;
  std::vector<Tensor> weights, biases;
  i64 begin, end;
  Options options;

  Arguments(const std::vector<Tensor>& parameters, const Tensor& dt, const Tensor& numbers, i64 begin, i64 end, i64 options)
      : K(parameters.at(0)), dt(dt), numbers(numbers),
        weights(parameters.begin() + 1, parameters.begin() + 1 + parameters.size() / 2),
        biases(parameters.begin() + 1 + parameters.size() / 2, parameters.end()), begin(begin), end(end), options{options} {}

  // what follows the activations
  int rest() const { return 3 * int(weights.size()); }
  double number(int i) const { return static_cast<const double*>(numbers.data_ptr())[i]; }
};

inline const double* take_activations(Activation* to, int n, const double* numbers) {
  for (int l = 0; l < n; ++l, numbers += 3) to[l] = {Kind(int(numbers[0])), numbers[1], numbers[2]};
  return numbers;
}

template <class T>
T* data(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

void check(const Tensor& a, const Arguments& in) {
  const auto dtype = a.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "hjepa_fast_cpp: float32 or float64 expected");
  STD_TORCH_CHECK(!in.weights.empty() && in.weights.size() <= MAX_LAYERS, "hjepa_fast_cpp: unsupported number of layers");
  STD_TORCH_CHECK(in.numbers.scalar_type() == ScalarType::Double && in.numbers.is_contiguous() &&
                      in.numbers.numel() >= in.rest() + 2,
                  "hjepa_fast_cpp: numbers must be float64");
  for (const auto* list : {&in.weights, &in.biases})
    for (const Tensor& x : *list)
      STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.is_cpu(), "hjepa_fast_cpp: unlike parameters");
  for (const Tensor* x : {&a, &in.K, &in.dt})
    STD_TORCH_CHECK(x->scalar_type() == dtype && x->is_contiguous() && x->is_cpu(), "hjepa_fast_cpp: unlike tensors");
}

template <class T>
Problem<T> problem_of(const Tensor& a, const Tensor& sq, const Tensor& tape, const Arguments& in) {
  Problem<T> p{};
  p.L = int(in.weights.size());
  i64 all = 0;
  for (int l = 0; l < p.L; ++l) all += 2 * (p.width[l] = in.weights[l].size(1));
  take_activations(p.activation, p.L, data<double>(in.numbers));
  p.B = a.size(0);
  p.n_steps = in.dt.size(1);
  p.begin = in.begin;
  p.end = in.end;
  p.n_sub = int(in.numbers.numel() - in.rest() - 2) / 4;
  p.scheme = data<double>(in.numbers) + in.rest() + 2;
  for (int i = 0; i < p.n_sub; ++i) p.implicit |= p.scheme[4 * i + 2] != 0 || p.scheme[4 * i + 3] != 0;
  p.tolerance = in.number(in.rest());
  p.max_evaluations = i64(in.number(in.rest() + 1));
  p.dt = data<T>(in.dt);
  p.dt_stride = in.dt.size(0) == 1 ? 0 : p.n_steps;
  p.n_kept = sq.size(1);
  p.tape_width = tape.size(3);
  p.tape_layers = p.tape_width == all - p.width[p.L - 1];
  p.tape = data<T>(tape);
  return p;
}

// Multiplications of one row in one evaluation of delta and the product that follows.
template <class T>
i64 work_of(const Problem<T>& p) {
  i64 work = p.width[0] * p.width[0];
  for (int l = 0; l + 1 < p.L; ++l) work += 2 * p.width[l] * p.width[l + 1];
  return work;
}

// Of all rows in all steps.
template <class T>
double call_work(const Problem<T>& p) {
  return double(work_of(p)) * p.B * p.n_sub * (p.end - p.begin);
}

// Waking a thread, and fetching from its cache what it wrote, costs as much as some 10^6 multiplications.
constexpr i64 WORTH_A_THREAD = 1200000;
// A thread that waits at a barrier anyway is woken once: multiplications of all threads between two of its meetings or so.
constexpr i64 WORTH_MEETINGS = 100000;

// Up to this many rows it is faster to read the weights as they are than to pack them and share the packed ones.
constexpr i64 FEW_ROWS = 2;
// So many uses of weights that stay in the cache are worth packing them even for so few.
constexpr i64 FEW_USES = 24;
// Up to this many a product x W reads W as it lies: it is used too seldom to be worth packing.
constexpr i64 SOME_ROWS = 256;

// Pieces of the team's memory. With no memory yet it only counts.
struct Memory {
  char* base = nullptr;
  i64 used = 0;
  template <class T>
  T* take(i64 n) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (n * i64(sizeof(T)) + 63) / 64 * 64;
    if (base) HJEPA_FORBID(base + used);
    used += FORBIDDEN;
    return piece;
  }
};

// Lays out the call's memory: once to count, once in place.
template <class F>
void lay_out(Team& team, F f) {
  Memory counted;
  f(counted);
  Memory memory{static_cast<char*>(team.scratch(counted.used))};
  HJEPA_ALLOW(memory.base, counted.used);
  f(memory);
}

// Large tensors that have just been allocated: large pages for them. Their memory comes to be when it is first written, and each page
// of 4 KiB costs a fault: 108 MB took 29 ms to fill so, and 8 ms in pages of 2 MiB.
void expect_writes(std::initializer_list<const Tensor*> tensors) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t PAGE = std::uintptr_t(1) << 21;
  for (const Tensor* x : tensors) {
    if (!x->is_contiguous()) continue;
    const auto at = reinterpret_cast<std::uintptr_t>(x->data_ptr());
    const auto first = (at + PAGE - 1) & ~(PAGE - 1), last = (at + x->numel() * x->element_size()) & ~(PAGE - 1);
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

// f(i, thread) for i < n, each by whichever thread is free.
template <class F>
void share_out(Team& team, i64 n, const F& f) {
  std::atomic<i64> next{0};
  const auto task = [&](int thread) {
    for (i64 i; (i = next++) < n;) f(i, thread);
  };
  team.run(task);
}

template <class T>
struct Pack {
  const T* from;
  i64 ld;
  bool transposed;
  i64 inner, columns;
  T* to;
};

// Right operands of products, packed or, with few rows or uses, as they lie; and what is to be packed.
template <class T>
struct Packer {
  const Kernels<T>& kernels;
  Memory& memory;
  // whether x W^T and x W are to be packed: the latter reads W nearly as fast as it lies
  bool transposed_too, straight_too;
  std::vector<Pack<T>> packs{};

  // x W, or x W^T
  Right<T> operator()(const Tensor& W, bool transposed) {
    if (!(transposed ? transposed_too : straight_too)) return {nullptr, data<T>(W), W.stride(0), transposed};
    const i64 inner = W.size(transposed), columns = W.size(!transposed);
    T* to = memory.take<T>(kernels.packed_size(inner, columns));
    packs.push_back({data<T>(W), W.stride(0), transposed, inner, columns, to});
    return {to, nullptr, (inner + kernels.depth - 1) / kernels.depth, transposed};
  }

  // x M, or x M^T, M some columns of W
  Right<T> columns(const Tensor& W, i64 from, i64 n, bool transposed = false) {
    if (!(transposed ? transposed_too : straight_too)) return {nullptr, data<T>(W) + from, W.stride(0), transposed};
    const i64 inner = transposed ? n : W.size(0), wide = transposed ? W.size(0) : n;
    T* to = memory.take<T>(kernels.packed_size(inner, wide));
    packs.push_back({data<T>(W) + from, W.stride(0), transposed, inner, wide, to});
    return {to, nullptr, (inner + kernels.depth - 1) / kernels.depth, transposed};
  }

  void take(Net<T>& net, const std::vector<Tensor>& weights) {
    for (int l = 0; l + 1 < net.L; ++l) {
      net.by_WT[l] = (*this)(weights[l], true);
      net.by_W[l] = (*this)(weights[l], false);
    }
  }
};

template <class T>
void run(const std::vector<Pack<T>>& packs, Team& team, const Kernels<T>& kernels) {
  i64 n = 0;
  for (const Pack<T>& pack : packs) n += kernels.n_panels(pack.columns);
  share_out(team, n, [&](i64 i, int) {
    for (const Pack<T>& pack : packs) {
      const i64 panels = kernels.n_panels(pack.columns);
      if (i < panels) return kernels.pack(pack.from, pack.ld, pack.transposed, pack.inner, pack.columns, pack.to, i, i + 1);
      i -= panels;
    }
  });
}

// A vector padded with zeros.
template <class T>
T* padded(const Tensor& x, const Kernels<T>& kernels, Memory& memory) {
  const i64 n = x.numel(), all = kernels.ld(n);
  T* to = memory.take<T>(all);
  if (memory.base) std::fill(std::copy_n(data<T>(x), n, to), to + all, T(0));
  return to;
}

template <class T>
struct Weights {
  const std::vector<Tensor>&weights, &biases;
  const Kernels<T>& kernels;

  // biases and output weights, padded with zeros
  void take_padded(Net<T>& p, Memory& memory) const {
    for (int l = 0; l < p.L; ++l) p.b[l] = padded(biases[l], kernels, memory);
    p.W[p.L - 1] = padded(weights[p.L - 1], kernels, memory);
  }

  // matrices row by row, copied only if their rows are no whole number of vectors
  void take_rows(Problem<T>& p, const Tensor& K, Memory& memory) const {
    const auto rows = [&](const Tensor& x, i64& ld) -> const T* {
      const i64 m = x.size(0), n = x.size(1);
      if (n % kernels.lanes == 0) {
        ld = n;
        return data<T>(x);
      }
      ld = kernels.ld(n);
      T* to = memory.take<T>(m * ld);
      if (memory.base)
        for (i64 r = 0; r < m; ++r) std::fill(std::copy_n(data<T>(x) + r * n, n, to + r * ld), to + (r + 1) * ld, T(0));
      return to;
    };
    for (int l = 0; l + 1 < p.L; ++l) p.W[l] = rows(weights[l], p.ldW[l]);
    p.K = rows(K, p.ldK);
  }

  std::vector<Pack<T>> take_packed(Problem<T>& p, const Tensor& K, bool need_K, bool need_KT, Memory& memory) const {
    Packer<T> packer{kernels, memory, true, true};
    packer.take(p, weights);
    if (need_K) p.by_K = packer(K, false);
    if (need_KT) p.by_KT = packer(K, true);
    return packer.packs;
  }
};

template <class T>
void take_network(Net<T>& p, const std::vector<Tensor>& weights, bool keep, bool layers) {
  p.L = int(weights.size());
  i64 all = 0;
  for (int l = 0; l < p.L; ++l) all += 2 * (p.width[l] = weights[l].size(1));
  p.tape_layers = layers || p.L == 1;
  p.tape_width = !keep ? 0 : p.tape_layers ? all - p.width[p.L - 1] : p.width[0];
}

template <class T>
void needs(const Problem<T>& p, bool& kick, bool& drift) {
  kick = drift = false;
  for (int i = 0; i < p.n_sub; ++i) {
    kick |= p.scheme[4 * i] != 0 || p.scheme[4 * i + 2] != 0;
    drift |= p.scheme[4 * i + 1] != 0 || p.scheme[4 * i + 3] != 0;
  }
}

template <class T>
void run_features(const Kernels<T>& kernels, const Weights<T>& weights, const Arguments& in, Problem<T>& p) {
  const i64 n_threads = work_of(p) * p.B < WORTH_MEETINGS ? 1 : in.options.n_threads();
  Team team(int(std::min<i64>(n_threads, N_BLOCKS)), call_work(p));
  T* shared = nullptr;
  std::vector<T*> scratch(team.size());
  lay_out(team, [&](Memory& memory) {
    weights.take_padded(p, memory);
    weights.take_rows(p, in.K, memory);
    shared = memory.template take<T>(kernels.shared_scratch(p));
    // the ends of rows that are no whole number of vectors are read, against zeros, and must not hold NaN
    if (memory.base) std::fill_n(shared, kernels.shared_scratch(p), T(0));
    for (T*& own : scratch) own = memory.template take<T>(kernels.thread_scratch(p));
  });
  const BarrierOwner owner(team.size());
  const auto task = [&](int thread) {
    kernels.forward_features(p, thread, team.size(), *owner.barrier, shared, scratch[thread]);
  };
  team.run(task);
  if (team.size() > 1 && dismissed(*owner.barrier, p.end)) team.note_wait();
}

// Up to this many rows threads share a tile, each with its columns: on tiles of their own with few rows each would fetch all
// weights, from beyond its own cache. With more they have more numbers to exchange. Measured on two cores, 8 rows of the published
// network: rollouts 1.47 times as fast; at 24 rows, or 12 in the backward pass, slower. Weights that fit into a thread's own cache are
// better fetched: with 200 x 200 ones a crew took 1.1 to 1.7 times as long as one thread did alone.
constexpr i64 CREW_ROWS = 16, CREW_ROWS_BACKWARD = 8, CREW_BYTES = i64(1) << 20;

bool wants_crew(i64 rows, i64 most, i64 path, i64 weight_bytes) {
  return path == CREW || (path == CHOOSE && rows <= most && weight_bytes > CREW_BYTES);
}

// f(task, thread, crew_size, barrier): by a crew, of which everyone does the one task; or each task by whichever thread is free.
template <class F>
void run_tasks(Team& team, i64 n_steps, i64 n_tasks, bool crew, const F& f) {
  if (!crew || team.size() == 1) return share_out(team, n_tasks, [&](i64 i, int thread) { f(i, thread, 1, nullptr); });
  const BarrierOwner owner(team.size());
  const auto task = [&](int thread) { f(0, thread, team.size(), owner.barrier); };
  team.run(task);
  if (dismissed(*owner.barrier, n_steps)) team.note_wait();
}

template <class T>
void run_rows(const Kernels<T>& kernels, const Weights<T>& weights, const Arguments& in, Problem<T>& p) {
  const i64 n_threads = call_work(p) < WORTH_A_THREAD ? 1 : in.options.n_threads();
  const bool crew = wants_crew(p.B, CREW_ROWS, in.options.path(), work_of(p) * i64(sizeof(T)));
  Team team(int(crew ? std::min(n_threads, kernels.n_panels(p.width[0])) : n_threads), call_work(p));
  const i64 rounds = (p.B + kernels.tile_rows * team.size() - 1) / (kernels.tile_rows * team.size());
  const i64 n_tiles = crew ? 1 : std::min(rounds * team.size(), p.B), rows = (p.B + n_tiles - 1) / n_tiles;
  const int n_scratch = crew ? 1 : team.size(), crew_size = crew ? team.size() : 1;
  bool kick, drift;
  needs(p, kick, drift);
  std::vector<T*> scratch(n_scratch);
  std::vector<Pack<T>> packs;
  lay_out(team, [&](Memory& memory) {
    weights.take_padded(p, memory);
    packs = weights.take_packed(p, in.K, drift, kick, memory);
    for (T*& own : scratch) own = memory.template take<T>(kernels.forward_scratch(p, rows, crew_size));
  });
  run(packs, team, kernels);
  run_tasks(team, p.end - p.begin, n_tiles, crew, [&](i64 i, int thread, int size, Barrier* barrier) {
    const i64 from = p.B * i / n_tiles, to = p.B * (i + 1) / n_tiles;
    kernels.forward(p, from, to - from, size > 1 ? thread : 0, size, barrier, scratch[crew ? 0 : thread]);
  });
}

// A parameter's gradient as a matrix, and where each task has its own.
template <class T>
struct Part {
  i64 m, n, ld;
  bool transposed;  // of_task, [n, ld(m)]
  T* total;
  std::vector<T*> of_task;

  i64 size(const Kernels<T>& kernels) const { return transposed ? n * kernels.ld(m) : m * kernels.ld(n); }
};

template <class T, class S, class F>
Part<T> part_of(const Tensor& total, std::vector<S>& task_sums, F of, Memory& memory, const Kernels<T>& kernels,
                bool transposed = false) {
  Part<T> part{total.dim() == 2 ? total.size(0) : 1,
               total.size(total.dim() - 1),
               total.dim() == 2 ? total.stride(0) : total.numel(),
               transposed,
               data<T>(total),
               {}};
  for (S& own : task_sums) part.of_task.push_back(of(own) = memory.take<T>(part.size(kernels)));
  return part;
}

template <class T>
void clear(const std::vector<Part<T>>& parts, Team& team, const Kernels<T>& kernels) {
  share_out(team, i64(parts.size()), [&](i64 i, int) {
    for (T* own : parts[i].of_task) std::fill_n(own, parts[i].size(kernels), T(0));
  });
}

// The tasks' sums are added to the totals in their order; or are the totals, which hold nothing yet.
template <class T>
void add_up(const std::vector<Part<T>>& parts, Team& team, const Kernels<T>& kernels, bool fresh = false) {
  constexpr i64 SHARES = 16;
  share_out(team, i64(parts.size()) * SHARES, [&](i64 i, int) {
    const Part<T>& part = parts[i / SHARES];
    for (i64 r = part.m * (i % SHARES) / SHARES; r < part.m * (i % SHARES + 1) / SHARES; ++r) {
      T* total = part.total + r * part.ld;
      if (part.transposed) {
        const i64 ld = kernels.ld(part.m);
        for (i64 c = 0; c < part.n; ++c) {
          T sum = fresh ? T(0) : total[c];
          for (const T* own : part.of_task) sum += own[c * ld + r];
          total[c] = sum;
        }
        continue;
      }
      const i64 at = r * kernels.ld(part.n);
      auto own = part.of_task.begin();
      if (fresh) std::copy_n(*own++ + at, part.n, total);
      for (; own != part.of_task.end(); ++own)
        for (i64 c = 0; c < part.n; ++c) total[c] += (*own)[at + c];
    }
  });
}

template <class T>
void forward_as(Tensor& a, Tensor& sq, Tensor& sp, Tensor& energy, Tensor& tape, Tensor& residual, Tensor& evaluations,
                const Arguments& in) {
  Problem<T> p = problem_of<T>(a, sq, tape, in);
  p.a = data<T>(a);
  p.sq = data<T>(sq);
  p.sp = data<T>(sp);
  p.energy = data<T>(energy);
  p.residual = data<T>(residual);
  p.evaluations = data<std::int32_t>(evaluations);
  const Kernels<T>& kernels = kernels_for<T>(in.options.isa(), in.options.bf16() && !p.implicit);
  const Weights<T> weights{in.weights, in.biases, kernels};
  const bool features = !p.implicit && (in.options.path() == FEATURES || (in.options.path() == CHOOSE && p.B <= FEW_ROWS));
  (features ? run_features<T> : run_rows<T>)(kernels, weights, in, p);
}

template <class T>
void backward_as(Tensor& la, Tensor& lsq, Tensor& lsp, Tensor& gdt, Tensor& residual, const std::vector<Tensor>& sums,
                 const Tensor& gsq, const Tensor& gsp, const Tensor& gE, const Tensor& tape, const Arguments& in) {
  Problem<T> p = problem_of<T>(la, gsq, tape, in);
  p.la = data<T>(la);
  p.lsq = data<T>(lsq);
  p.lsp = data<T>(lsp);
  p.gdt = data<T>(gdt);
  p.residual = data<T>(residual);
  p.gsq = data<T>(gsq);
  p.gsp = data<T>(gsp);
  p.gE = data<T>(gE);
  const Kernels<T>& kernels = kernels_for<T>(in.options.isa(), in.options.bf16() && !p.implicit);
  const Weights<T> weights{in.weights, in.biases, kernels};
  const i64 steps = p.end - p.begin;
  const bool small = work_of(p) * p.B * p.n_sub * steps < WORTH_A_THREAD;
  // the tasks, and with them the order of summation, do not depend on how many threads there turn out to be
  const bool crew = wants_crew(p.B, CREW_ROWS_BACKWARD, in.options.path(), work_of(p) * i64(sizeof(T)));
  const i64 n_tasks = small || crew ? 1 : std::min(in.options.n_threads(), p.B), share = (p.B + n_tasks - 1) / n_tasks;
  const i64 tiles = crew ? 1 : (share + kernels.tile_rows - 1) / kernels.tile_rows, rows = (share + tiles - 1) / tiles;
  Team team(int(crew && !small ? std::min(in.options.n_threads(), kernels.n_panels(p.width[0])) : n_tasks), 3 * call_work(p));
  const int n_scratch = crew ? 1 : team.size(), crew_size = crew ? team.size() : 1;
  bool kick, drift;
  needs(p, kick, drift);
  std::vector<T*> scratch(n_scratch);
  std::vector<Sums<T>> task_sums(sums.empty() ? 0 : n_tasks);
  std::vector<Pack<T>> packs;
  std::vector<Part<T>> parts;  // gradient of K, W_2, ..., b_2, ...
  lay_out(team, [&](Memory& memory) {
    weights.take_padded(p, memory);
    packs = weights.take_packed(p, in.K, true, true, memory);
    for (T*& own : scratch) own = memory.template take<T>(kernels.backward_scratch(p, rows, !sums.empty(), crew_size));
    if (sums.empty()) return;
    parts.clear();
    const auto add_part = [&](const Tensor& total, auto of) {
      parts.push_back(part_of<T>(total, task_sums, of, memory, kernels));
    };
    add_part(sums[0], [](Sums<T>& own) -> T*& { return own.K; });
    for (int l = 0; l < p.L; ++l) add_part(sums[1 + l], [l](Sums<T>& own) -> T*& { return own.W[l]; });
    for (int l = 0; l < p.L; ++l) add_part(sums[1 + p.L + l], [l](Sums<T>& own) -> T*& { return own.b[l]; });
  });
  run(packs, team, kernels);
  clear(parts, team, kernels);
  run_tasks(team, steps, n_tasks, crew, [&](i64 i, int thread, int size, Barrier* barrier) {
    const Sums<T>* own = sums.empty() ? nullptr : &task_sums[i];
    kernels.backward(p, p.B * i / n_tasks, p.B * (i + 1) / n_tasks, rows, size > 1 ? thread : 0, size, barrier,
                     scratch[crew ? 0 : thread], own);
  });
  add_up(parts, team, kernels);
}

void forward(Tensor a, Tensor sq, Tensor sp, Tensor energy, Tensor tape, Tensor residual, Tensor evaluations,
             std::vector<Tensor> parameters, Tensor dt, Tensor numbers, int64_t begin, int64_t end, int64_t options) {
  const Arguments in(parameters, dt, numbers, begin, end, options);
  check(a, in);
  expect_writes({&sq, &sp, &tape});
  const auto run = a.scalar_type() == ScalarType::Float ? forward_as<float> : forward_as<double>;
  run(a, sq, sp, energy, tape, residual, evaluations, in);
}

// given: cotangents of sq, sp and the energies.
void backward(Tensor la, Tensor lsq, Tensor lsp, Tensor gdt, Tensor residual, std::vector<Tensor> sums,
              std::vector<Tensor> given, Tensor tape, std::vector<Tensor> parameters, Tensor dt, Tensor numbers, int64_t begin,
              int64_t end, int64_t options) {
  const Arguments in(parameters, dt, numbers, begin, end, options);
  check(la, in);
  const auto run = la.scalar_type() == ScalarType::Float ? backward_as<float> : backward_as<double>;
  run(la, lsq, lsp, gdt, residual, sums, given.at(0), given.at(1), given.at(2), tape, in);
}

template <class T>
void product_as(Tensor& Y, const Tensor& X, const Tensor& W, bool transposed, const Tensor& base, Options options) {
  const Kernels<T>& kernels = kernels_for<T>(options.isa(), false);
  const i64 m = X.size(0), inner = X.size(1), columns = Y.size(2), panels = kernels.n_panels(columns);
  const Target<T> y{data<T>(Y), Y.size(1), Y.stride(0), Y.stride(1), data<T>(base), base.numel() ? base.stride(0) : 0};
  const i64 wide = 2 * kernels.lanes, size = inner * wide;
  // few rows share out the columns, and W's whole panels are used as they are: packing costs more than it saves
  const bool few = m <= kernels.tile_rows;
  const i64 as_is = few && !transposed ? columns / wide : 0;
  const i64 row_tiles = few ? 1 : (m + kernels.tile_rows - 1) / kernels.tile_rows, column_tiles = few ? panels : 1;
  const i64 n_threads = m * inner * columns < WORTH_A_THREAD ? 1 : options.n_threads();
  Team team(int(std::min<i64>(n_threads, row_tiles * column_tiles)), double(m) * inner * columns);
  T* packed = nullptr;
  lay_out(team, [&](Memory& memory) { packed = memory.template take<T>((panels - as_is) * size); });
  packed -= as_is * size;
  const Operand<T> whole{data<T>(W), transposed ? 0 : W.stride(0), wide}, rest{packed, wide, size};
  share_out(team, panels - as_is, [&](i64 i, int) {
    kernels.pack(data<T>(W), W.stride(0), transposed, inner, columns, packed, as_is + i, as_is + i + 1);
  });
  share_out(team, row_tiles * column_tiles, [&](i64 i, int) {
    const i64 row = m * (i / column_tiles) / row_tiles, rows = m * (i / column_tiles + 1) / row_tiles - row;
    const i64 panel = i % column_tiles, last = few ? std::min((panel + 1) * wide, columns) : columns;
    kernels.multiply(data<T>(X), row, rows, inner, panel < as_is ? whole : rest, panel * wide, last, y);
  });
}

// Y [B, n, columns] = base [B, columns] (if not empty) + X [B n, inner] W, W [inner, columns] or, transposed, its transpose.
void product(Tensor Y, Tensor X, Tensor W, bool transposed, Tensor base, int64_t options) {
  const auto dtype = Y.scalar_type();
  const auto along_rows = [](const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1; };
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "hjepa_fast_cpp: float32 or float64 expected");
  STD_TORCH_CHECK(X.scalar_type() == dtype && W.scalar_type() == dtype && base.scalar_type() == dtype && X.is_contiguous() &&
                      Y.dim() == 3 && along_rows(Y) && along_rows(W) && X.size(0) == Y.size(0) * Y.size(1) &&
                      X.size(1) == W.size(transposed) && Y.size(2) == W.size(!transposed) &&
                      (!base.numel() || (base.size(0) == Y.size(0) && base.size(1) == Y.size(2) && along_rows(base))),
                  "hjepa_fast_cpp: unlike factors");
  (dtype == ScalarType::Float ? product_as<float> : product_as<double>)(Y, X, W, transposed, base, {options});
}

#include "program_ops.h"

#include "gradient_ops.h"

#include "states_ops.h"

int64_t isa() { return supported_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hjepa_fast_cpp, m) {
  m.def("isa() -> int");
  m.def(
      "forward(Tensor(a!) a, Tensor(b!) sq, Tensor(c!) sp, Tensor(d!) energy, Tensor(e!) tape, Tensor(f!) residual, "
      "Tensor(g!) evaluations, " DENSE_ARGUMENTS);
  m.def(
      "backward(Tensor(a!) la, Tensor(b!) lsq, Tensor(c!) lsp, Tensor(d!) gdt, Tensor(e!) residual, Tensor(f!)[] sums, "
      "Tensor[] given, Tensor tape, " DENSE_ARGUMENTS);
  m.def("product(Tensor(a!) Y, Tensor X, Tensor W, bool transposed, Tensor base, int options) -> ()");
}

STABLE_TORCH_LIBRARY_FRAGMENT(hjepa_fast_cpp, m) {
  m.def(PROGRAM_FORWARD);
  m.def(PROGRAM_BACKWARD);
  m.def(GRADIENT);
  m.def(GRADIENT_BACKWARD);
  m.def(STATES_FORWARD);
  m.def(STATES_BACKWARD);
  m.def(STATES_GRADIENT);
  m.def(STATES_GRADIENT_BACKWARD);
}

STABLE_TORCH_LIBRARY_IMPL(hjepa_fast_cpp, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

STABLE_TORCH_LIBRARY_IMPL(hjepa_fast_cpp, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("product", TORCH_BOX(&product));
  m.impl("program_forward", TORCH_BOX(&program_forward));
  m.impl("program_backward", TORCH_BOX(&program_backward));
  m.impl("gradient", TORCH_BOX(&gradient));
  m.impl("gradient_backward", TORCH_BOX(&gradient_backward));
  m.impl("states_forward", TORCH_BOX(&states_forward));
  m.impl("states_backward", TORCH_BOX(&states_backward));
  m.impl("states_gradient", TORCH_BOX(&states_gradient));
  m.impl("states_gradient_backward", TORCH_BOX(&states_gradient_backward));
}

}  // namespace hjepa_fast
