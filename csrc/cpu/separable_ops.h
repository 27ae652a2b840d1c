// The operators of the separable loop: included by ops.cpp, whose helpers they use.
#pragma once

// N, V's and T's layers after the first (T's empty where T = (s p) . p / 2), and what of the call they are for
#define SEPARABLE_ARGUMENTS                                                                                            \
  "Tensor N, Tensor[] v_weights, Tensor[] v_biases, Tensor[] t_weights, Tensor[] t_biases, Tensor dt, Tensor moves, "  \
  "int begin, int end, int before_V, int before_T, bool known_V, bool known_T, int all_of_V, bool with_energy, "       \
  "bool last, bool layers, int v_kind, float v_beta, float v_threshold, int t_kind, float t_beta, float t_threshold, " \
  "bool bf16, int n_threads, int isa) -> ()"

constexpr const char* SEPARABLE_FORWARD =
    "separable_forward(Tensor(a!) aV, Tensor(b!) aT, Tensor(c!) sp, Tensor(d!) sq, Tensor(e!) sps, Tensor(f!) sqs, "
    "Tensor(g!) aTs, Tensor(h!) energy, Tensor(i!) tape, " SEPARABLE_ARGUMENTS;
constexpr const char* SEPARABLE_BACKWARD =
    "separable_backward(Tensor(a!) aV, Tensor(b!) aT, Tensor(c!) sp, Tensor(d!) sq, Tensor(e!) value_of_sp, "
    "Tensor(f!) gdt, Tensor(g!)[] sums_V, Tensor(h!)[] sums_T, Tensor(i!) gN, Tensor gsp, Tensor gsq, Tensor gaT, "
    "Tensor gE, Tensor tape, " SEPARABLE_ARGUMENTS;

struct SeparableArguments {
  const Tensor& N;
  const std::vector<Tensor>&v_weights, &v_biases, &t_weights, &t_biases;
  const Tensor &dt, &moves;
  i64 begin, end, before_V, before_T;
  bool known_V, known_T;
  i64 all_of_V;
  bool with_energy, last, layers;
  i64 v_kind;
  double v_beta, v_threshold;
  i64 t_kind;
  double t_beta, t_threshold;
  bool bf16;
  i64 n_threads, isa;

  // as those of one network
  Arguments of_V() const {
    return {N, dt, moves, v_weights, v_biases, begin, end, v_kind, v_beta, v_threshold, bf16, 0, 0, n_threads, isa, ROWS};
  }
  Arguments of_T() const {
    return {N, dt, moves, t_weights, t_biases, begin, end, t_kind, t_beta, t_threshold, bf16, 0, 0, n_threads, isa, ROWS};
  }
};

void check(const std::vector<const Tensor*>& tensors, const SeparableArguments& in) {
  check(in.N, in.of_V());
  if (!in.t_weights.empty()) check(in.N, in.of_T());
  for (const Tensor* x : tensors)
    STD_TORCH_CHECK(x->scalar_type() == in.N.scalar_type() && x->is_contiguous() && x->is_cpu(),
                    "hjepa_fast_cpp: unlike tensors");
}

template <class T>
void take_network(Problem<T>& p, const std::vector<Tensor>& weights, Kind kind, double beta, double threshold, bool keep,
                  bool layers) {
  p.L = int(weights.size());
  i64 all = 0;
  for (int l = 0; l < p.L; ++l) all += 2 * (p.width[l] = weights[l].size(1));
  p.activation = {kind, beta, threshold};
  p.tape_layers = layers || p.L == 1;
  p.tape_width = !keep ? 0 : p.tape_layers ? all - p.width[p.L - 1] : p.width[0];
}

template <class T>
Separable<T> separable_of(const Tensor& aV, const Tensor& aT, const Tensor& sp, const Tensor& sq, const Tensor& tape,
                          const SeparableArguments& in) {
  Separable<T> p{};
  const bool keep = tape.size(1) > 0;
  take_network(p.V, in.v_weights, Kind(in.v_kind), in.v_beta, in.v_threshold, keep, in.layers);
  p.quadratic = in.t_weights.empty();
  if (p.quadratic) {
    p.T.L = 1;
    p.T.width[0] = in.N.size(1);
    p.T.tape_width = keep ? in.N.size(1) : 0;
  } else {
    take_network(p.T, in.t_weights, Kind(in.t_kind), in.t_beta, in.t_threshold, keep, in.layers);
  }
  p.B = aV.size(0);
  p.n_steps = in.dt.size(1);
  p.begin = in.begin;
  p.end = in.end;
  p.with_energy = in.with_energy;
  p.last = in.last;
  p.n_moves = int(in.moves.size(0));
  p.moves = data<double>(in.moves);
  p.dt = data<T>(in.dt);
  p.dt_stride = in.dt.size(0) == 1 ? 0 : p.n_steps;
  p.tape = data<T>(tape);
  p.tape_width = tape.size(1);
  p.offset_T = in.all_of_V * p.V.tape_width;
  p.before_V = in.before_V;
  p.before_T = in.before_T;
  p.known_V = in.known_V;
  p.known_T = in.known_T;
  p.aV = data<T>(aV);
  p.aT = data<T>(aT);
  p.sp = data<T>(sp);
  p.sq = data<T>(sq);
  return p;
}

// Multiplications of one row in one step.
template <class T>
double work_of(const Separable<T>& p) {
  const double products = double(p.V.width[0]) * p.T.width[0];
  double of_V = products, of_T = p.quadratic ? 0 : products;
  for (int l = 0; l + 1 < p.V.L; ++l) of_V += 2.0 * p.V.width[l] * p.V.width[l + 1];
  for (int l = 0; l + 1 < p.T.L; ++l) of_T += 2.0 * p.T.width[l] * p.T.width[l + 1];
  double work = 0;
  for (int i = 0; i < p.n_moves; ++i) work += (p.moves[2 * i] != 0) * of_V + (p.moves[2 * i + 1] != 0) * of_T;
  return work;
}

// The memory that both networks and N take, and what is to be packed into it.
template <class T>
struct SeparableWeights {
  const SeparableArguments& in;
  const Kernels<T>& kernels;
  const Arguments of_V = in.of_V(), of_T = in.of_T();
  const Weights<T> V{of_V, kernels}, T_{of_T, kernels};

  std::vector<typename Weights<T>::Pack> take(Separable<T>& p, Memory& memory) const {
    V.take_padded(p.V, memory);
    std::vector<typename Weights<T>::Pack> packs = V.take_packed(p.V, true, true, memory);
    p.N_packed = p.V.K_packed;
    p.NT_packed = p.V.KT_packed;
    if (p.quadratic) return packs;
    T_.take_padded(p.T, memory);
    const auto more = T_.take_packed(p.T, false, false, memory);
    packs.insert(packs.end(), more.begin(), more.end());
    return packs;
  }
};

template <class T>
void separable_forward_as(Separable<T> p, const SeparableArguments& in) {
  const Kernels<T>& kernels = kernels_for<T>(in.isa, in.bf16);
  const SeparableWeights<T> weights{in, kernels};
  const double work = work_of(p) * p.B * (p.end - p.begin);
  Team team(work < WORTH_A_THREAD ? 1 : int(in.n_threads), work);
  const i64 rounds = (p.B + kernels.tile_rows * team.size() - 1) / (kernels.tile_rows * team.size());
  const i64 n_tiles = std::min(rounds * team.size(), p.B), rows = (p.B + n_tiles - 1) / n_tiles;
  std::vector<T*> scratch(team.size());
  std::vector<typename Weights<T>::Pack> packs;
  lay_out(team, [&](Memory& memory) {
    packs = weights.take(p, memory);
    for (T*& own : scratch) own = memory.template take<T>(kernels.separable_forward_scratch(p, rows));
  });
  weights.V.run(packs, team);
  share_out(team, n_tiles, [&](i64 i, int thread) {
    const i64 from = p.B * i / n_tiles, to = p.B * (i + 1) / n_tiles;
    kernels.separable_forward(p, from, to - from, scratch[thread]);
  });
}

template <class T>
void separable_backward_as(Separable<T> p, const std::vector<Tensor>& sums_V, const std::vector<Tensor>& sums_T,
                           const Tensor& gN, const SeparableArguments& in) {
  const Kernels<T>& kernels = kernels_for<T>(in.isa, in.bf16);
  const SeparableWeights<T> weights{in, kernels};
  const double work = work_of(p) * p.B * (p.end - p.begin);
  // as in backward_as: tasks, and with them the order of summation, do not depend on how many threads there are
  const i64 n_tasks = work < WORTH_A_THREAD ? 1 : std::min(in.n_threads, p.B), share = (p.B + n_tasks - 1) / n_tasks;
  const i64 tiles = (share + kernels.tile_rows - 1) / kernels.tile_rows, rows = (share + tiles - 1) / tiles;
  Team team(int(n_tasks), 3 * work);
  const bool with_sums = gN.numel() > 0;
  std::vector<T*> scratch(team.size());
  std::vector<SeparableSums<T>> task_sums(with_sums ? n_tasks : 0);
  std::vector<typename Weights<T>::Pack> packs;
  std::vector<Part<T>> parts;
  lay_out(team, [&](Memory& memory) {
    packs = weights.take(p, memory);
    for (SeparableSums<T>& own : task_sums) own.need_V = !sums_V.empty(), own.need_T = !sums_T.empty();
    const SeparableSums<T>* any = with_sums ? &task_sums[0] : nullptr;
    for (T*& own : scratch) own = memory.template take<T>(kernels.separable_backward_scratch(p, rows, any));
    parts.clear();
    if (!with_sums) return;
    const auto add = [&](const Tensor& total, auto of) {
      parts.push_back(part_of<T>(total, task_sums, of, memory, kernels));
    };
    add(gN, [](SeparableSums<T>& own) -> T*& { return own.N; });
    const auto add_network = [&](const std::vector<Tensor>& sums, auto of) {
      const int n = int(sums.size() / 2);
      for (int l = 0; l < n; ++l) {
        add(sums[l], [=](SeparableSums<T>& own) -> T*& { return of(own).W[l]; });
        add(sums[n + l], [=](SeparableSums<T>& own) -> T*& { return of(own).b[l]; });
      }
    };
    add_network(sums_V, [](SeparableSums<T>& own) -> Sums<T>& { return own.V; });
    add_network(sums_T, [](SeparableSums<T>& own) -> Sums<T>& { return own.T; });
  });
  weights.V.run(packs, team);
  clear(parts, team, kernels);
  share_out(team, n_tasks, [&](i64 i, int thread) {
    const SeparableSums<T>* own = with_sums ? &task_sums[i] : nullptr;
    kernels.separable_backward(p, p.B * i / n_tasks, p.B * (i + 1) / n_tasks, rows, scratch[thread], own);
  });
  add_up(parts, team, kernels);
}

void separable_forward(Tensor aV, Tensor aT, Tensor sp, Tensor sq, Tensor sps, Tensor sqs, Tensor aTs, Tensor energy,
                       Tensor tape, Tensor N, std::vector<Tensor> v_weights, std::vector<Tensor> v_biases,
                       std::vector<Tensor> t_weights, std::vector<Tensor> t_biases, Tensor dt, Tensor moves, int64_t begin,
                       int64_t end, int64_t before_V, int64_t before_T, bool known_V, bool known_T, int64_t all_of_V,
                       bool with_energy, bool last, bool layers, int64_t v_kind, double v_beta, double v_threshold,
                       int64_t t_kind, double t_beta, double t_threshold, bool bf16, int64_t n_threads, int64_t isa) {
  const SeparableArguments in{N, v_weights, v_biases, t_weights, t_biases, dt, moves, begin, end, before_V, before_T, known_V,
                              known_T, all_of_V, with_energy, last, layers, v_kind, v_beta, v_threshold, t_kind, t_beta,
                              t_threshold, bf16, n_threads, isa};
  check({&aV, &aT, &sp, &sq, &sps, &sqs, &aTs, &energy, &tape}, in);
  const auto run = [&]<class T>(T) {
    Separable<T> p = separable_of<T>(aV, aT, sp, sq, tape, in);
    p.sps = data<T>(sps);
    p.sqs = data<T>(sqs);
    p.aTs = data<T>(aTs);
    p.energy = data<T>(energy);
    separable_forward_as(p, in);
  };
  aV.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

void separable_backward(Tensor aV, Tensor aT, Tensor sp, Tensor sq, Tensor value_of_sp, Tensor gdt,
                        std::vector<Tensor> sums_V, std::vector<Tensor> sums_T, Tensor gN, Tensor gsp, Tensor gsq, Tensor gaT,
                        Tensor gE, Tensor tape, Tensor N, std::vector<Tensor> v_weights, std::vector<Tensor> v_biases,
                        std::vector<Tensor> t_weights, std::vector<Tensor> t_biases, Tensor dt, Tensor moves, int64_t begin,
                        int64_t end, int64_t before_V, int64_t before_T, bool known_V, bool known_T, int64_t all_of_V,
                        bool with_energy, bool last, bool layers, int64_t v_kind, double v_beta, double v_threshold,
                        int64_t t_kind, double t_beta, double t_threshold, bool bf16, int64_t n_threads, int64_t isa) {
  const SeparableArguments in{N, v_weights, v_biases, t_weights, t_biases, dt, moves, begin, end, before_V, before_T, known_V,
                              known_T, all_of_V, with_energy, last, layers, v_kind, v_beta, v_threshold, t_kind, t_beta,
                              t_threshold, bf16, n_threads, isa};
  check({&aV, &aT, &sp, &sq, &value_of_sp, &gdt, &gN, &gsp, &gsq, &gaT, &gE, &tape}, in);
  const auto run = [&]<class T>(T) {
    Separable<T> p = separable_of<T>(aV, aT, sp, sq, tape, in);
    p.value_of_sp = data<T>(value_of_sp);
    p.gdt = data<T>(gdt);
    p.gsp = data<T>(gsp);
    p.gsq = data<T>(gsq);
    p.gaT = data<T>(gaT);
    p.gE = data<T>(gE);
    separable_backward_as(p, sums_V, sums_T, gN, in);
  };
  aV.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}
