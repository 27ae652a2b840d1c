// The operators of mechanical systems: included by ops.cpp, whose helpers they use.
#pragma once

// parameters: V's weights and biases, then the mass network's, or the entries of a constant mass. numbers: d, angles, mass, whether
// softplus, epsilon, layers of V and of the mass network; the angles; of each hidden layer's activation its kind, beta and threshold;
// tolerance, most evaluations, sub-steps, and of these the coefficients, four each, and mixes.
#define STATES_ARGUMENTS "Tensor[] parameters, Tensor numbers, "

constexpr const char* STATES_FORWARD =
    "states_forward(Tensor(a!) states, Tensor(b!) tape, Tensor(c!) residual, Tensor(d!) evaluations, " STATES_ARGUMENTS
    "Tensor dt, int begin, int end, int options) -> ()";
constexpr const char* STATES_BACKWARD =
    "states_backward(Tensor(a!) later, Tensor(b!) gdt, Tensor(c!) residual, Tensor(d!)[] sums, Tensor g_states, Tensor "
    "tape, " STATES_ARGUMENTS "Tensor dt, int begin, int end, int options) -> ()";
constexpr const char* STATES_GRADIENT = "states_gradient(Tensor(a!) gradient, Tensor z, " STATES_ARGUMENTS "int options) -> ()";
constexpr const char* STATES_GRADIENT_BACKWARD =
    "states_gradient_backward(Tensor(a!) g_z, Tensor(b!)[] sums, Tensor[] given, Tensor z, " STATES_ARGUMENTS
    "int options) -> ()";

// Up to so many outputs, or features, are formed one by one: a panel of the columns of a product is 8 to 32 wide.
constexpr i64 FEW_COLUMNS = 8;

// The memory of a call, and what it computes.
template <class T>
struct StatesCall {
  const std::vector<Tensor>& parameters;
  const Options options;
  const Kernels<T>& kernels;
  Mechanical<T> p{};

  StatesCall(const std::vector<Tensor>& parameters, const Tensor& numbers, i64 options)
      : parameters(parameters), options{options}, kernels(kernels_for<T>(Options{options}.isa(), false)) {
    const double* x = data<double>(numbers);
    const auto next = [&] { return i64(*x++); };
    p.d = int(next()), p.n_angles = int(next());
    p.mass = Mass(next()), p.softplus = next() != 0, p.epsilon = T(*x++);
    p.V.L = int(next()), p.N.L = int(next());
    STD_TORCH_CHECK(p.d > 0 && p.d <= MAX_COORDINATES && p.n_angles <= p.d && p.V.L <= MAX_LAYERS && p.N.L <= MAX_LAYERS,
                    "hjepa_fast_cpp: unsupported system");
    p.n_others = p.d - p.n_angles;
    p.n = p.d + p.n_angles;
    p.m = p.mass == Mass::identity ? 0 : p.mass == Mass::diagonal ? p.d : p.d * (p.d + 1) / 2;
    for (i64 i = 0; i < p.d; ++i) p.below[i] = p.d + i * (i - 1) / 2;
    bool angle[MAX_COORDINATES] = {};
    for (int i = 0; i < p.n_angles; ++i) angle[p.angles[i] = int(next())] = true;
    for (int i = 0, k = 0; i < p.d; ++i)
      if (!angle[i]) p.others[k++] = i;
    std::size_t at = 0;
    for (Dense<T>* net : {&p.V, &p.N}) {
      for (int l = 0; l < net->L; ++l) net->width[l + 1] = parameters.at(at + l).size(0);
      net->width[0] = p.n;
      at += 2 * net->L;
      x = take_activations(net->activation, std::max(net->L - 1, 0), x);
    }
    STD_TORCH_CHECK(parameters.size() == at + (p.m && !p.N.L), "hjepa_fast_cpp: unlike parameters");
    p.entries = p.m && !p.N.L ? data<T>(parameters[at]) : nullptr;
    p.tolerance = *x++, p.max_evaluations = next(), p.n_sub = int(next());
    p.scheme = x, p.mix = x + 4 * p.n_sub;
    STD_TORCH_CHECK(p.mix + p.n_sub * p.n_sub == data<double>(numbers) + numbers.numel(), "hjepa_fast_cpp: unlike numbers");
    for (int i = 0; i < p.n_sub; ++i) p.implicit |= p.scheme[4 * i + 2] != 0 || p.scheme[4 * i + 3] != 0;
    for (int i = 0; i < p.n_sub * p.n_sub; ++i) p.mixes |= p.mix[i] != 0;
    STD_TORCH_CHECK(!(p.implicit && p.mixes), "hjepa_fast_cpp: no scheme mixes gradients at implicit points");
  }

  // Multiplications of one row in one evaluation of f.
  double work() const {
    double each = 0;
    for (const Dense<T>* net : {&p.V, &p.N})
      for (int l = 0; l < net->L; ++l) each += 2.0 * net->width[l] * net->width[l + 1];
    return each;
  }

  std::vector<Pack<T>> take(Memory& memory) {
    Packer<T> packer{kernels, memory, true, true};
    std::size_t at = 0;
    for (Dense<T>* net : {&p.V, &p.N}) {
      for (int l = 0; l < net->L; ++l) {
        const Tensor& W = parameters[at + l];
        net->by_WT[l] = W.size(0) > FEW_COLUMNS ? packer(W, true) : Right<T>{nullptr, data<T>(W), W.size(1), true};
        net->by_W[l] = W.size(1) > FEW_COLUMNS ? packer(W, false) : Right<T>{nullptr, turned(W, memory), W.size(0), true};
        net->b[l] = padded(parameters[at + net->L + l], kernels, memory);
      }
      at += 2 * net->L;
    }
    return packer.packs;
  }

  // W^T.
  static const T* turned(const Tensor& W, Memory& memory) {
    const i64 m = W.size(0), n = W.size(1);
    T* to = memory.take<T>(m * n);
    for (i64 i = 0; memory.base && i < m; ++i)
      for (i64 j = 0; j < n; ++j) to[j * m + i] = data<T>(W)[i * n + j];
    return to;
  }

  // f(first row, last, rows of a tile, scratch) for the tiles of a call in which each row has `evaluations` of f.
  template <class F>
  void tiles(double evaluations, F f) {
    const double all = work() * evaluations * p.B;
    Team team(all < WORTH_A_THREAD ? 1 : int(options.n_threads()), all);
    const i64 rounds = (p.B + kernels.tile_rows * team.size() - 1) / (kernels.tile_rows * team.size());
    const i64 n_tiles = std::min(rounds * team.size(), p.B), rows = (p.B + n_tiles - 1) / n_tiles;
    std::vector<T*> scratch(team.size());
    std::vector<Pack<T>> packs;
    lay_out(team, [&](Memory& memory) {
      packs = take(memory);
      for (T*& own : scratch) own = memory.template take<T>(kernels.states_scratch(p, rows, false));
    });
    run(packs, team, kernels);
    share_out(team, n_tiles, [&](i64 i, int thread) {
      const i64 from = p.B * i / n_tiles, to = p.B * (i + 1) / n_tiles;
      f(from, to, rows, scratch[thread]);
    });
  }

  // f(first row, last, rows of a tile, scratch, sums) for the tasks of a backward call, whose sums are added to `sums`, in the order of
  // the parameters; none if there are none.
  template <class F>
  void tasks(double evaluations, const std::vector<Tensor>& sums, F f) {
    const double all = work() * evaluations * p.B;
    // tasks, and with them the order of summation, do not depend on how many threads there turn out to be
    const i64 n_tasks = all < WORTH_A_THREAD ? 1 : std::min(options.n_threads(), p.B), share = (p.B + n_tasks - 1) / n_tasks;
    const i64 tiles = (share + kernels.tile_rows - 1) / kernels.tile_rows, rows = (share + tiles - 1) / tiles;
    Team team(int(n_tasks), 3 * all);
    std::vector<T*> scratch(team.size());
    std::vector<MechanicalSums<T>> task_sums(sums.empty() ? 0 : n_tasks);
    std::vector<Pack<T>> packs;
    std::vector<Part<T>> parts;
    lay_out(team, [&](Memory& memory) {
      packs = take(memory);
      for (T*& own : scratch) own = memory.template take<T>(kernels.states_scratch(p, rows, true));
      if (sums.empty()) return;
      parts.clear();
      std::size_t at = 0;
      for (const bool mass : {false, true}) {
        const int L = (mass ? p.N : p.V).L;
        const auto of = [mass](MechanicalSums<T>& own) -> Sums<T>& { return mass ? own.N : own.V; };
        for (int l = 0; l < L; ++l)
          parts.push_back(part_of<T>(
              sums[at++], task_sums, [=](MechanicalSums<T>& own) -> T*& { return of(own).W[l]; }, memory, kernels, l == 0));
        for (int l = 0; l < L; ++l)
          parts.push_back(
              part_of<T>(sums[at++], task_sums, [=](MechanicalSums<T>& own) -> T*& { return of(own).b[l]; }, memory, kernels));
      }
      if (p.entries)
        parts.push_back(
            part_of<T>(sums[at], task_sums, [](MechanicalSums<T>& own) -> T*& { return own.entries; }, memory, kernels));
    });
    run(packs, team, kernels);
    clear(parts, team, kernels);
    share_out(team, n_tasks, [&](i64 i, int thread) {
      f(p.B * i / n_tasks, p.B * (i + 1) / n_tasks, rows, scratch[thread], sums.empty() ? nullptr : &task_sums[i]);
    });
    add_up(parts, team, kernels);
  }

  void set_steps(const Tensor& dt, const Tensor& tape, i64 begin, i64 end) {
    p.n_steps = dt.size(1);
    p.begin = begin, p.end = end;
    p.dt = data<T>(dt);
    p.dt_stride = dt.size(0) == 1 ? 0 : p.n_steps;
    p.tape = data<T>(tape);
    p.tape_width = tape.size(3);
    p.tape_layers = p.tape_width > 4 * p.d;
  }
};

// What is not empty must be of one dtype, contiguous and on the CPU.
void check_states(const Tensor& like, const std::vector<const Tensor*>& tensors, const std::vector<Tensor>& parameters,
                  const Tensor& numbers) {
  const auto dtype = like.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "hjepa_fast_cpp: float32 or float64 expected");
  STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous() && numbers.numel() > 9,
                  "hjepa_fast_cpp: numbers must be float64");
  for (const Tensor& y : parameters)
    STD_TORCH_CHECK(y.scalar_type() == dtype && y.is_contiguous() && y.is_cpu(), "hjepa_fast_cpp: unlike parameters");
  for (const Tensor* y : tensors)
    STD_TORCH_CHECK(y->scalar_type() == dtype && y->is_contiguous() && y->is_cpu(), "hjepa_fast_cpp: unlike tensors");
}

// states [B, n_steps + 1, 2d]: those at step `begin` are there.
void states_forward(Tensor states, Tensor tape, Tensor residual, Tensor evaluations, std::vector<Tensor> parameters,
                    Tensor numbers, Tensor dt, int64_t begin, int64_t end, int64_t options) {
  check_states(states, {&states, &tape, &residual, &dt}, parameters, numbers);
  expect_writes({&tape});
  const auto run = [&]<class T>(T) {
    StatesCall<T> call(parameters, numbers, options);
    call.p.B = states.size(0);
    call.set_steps(dt, tape, begin, end);
    call.p.states = data<T>(states);
    call.p.residual = data<T>(residual);
    call.p.evaluations = data<std::int32_t>(evaluations);
    call.tiles(double(end - begin) * call.p.n_sub * (call.p.implicit ? 4 : 1),
               [&](i64 row, i64 last, i64 rows, T* scratch) { call.kernels.states_forward(call.p, row, last, rows, scratch); });
  };
  states.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

void states_backward(Tensor later, Tensor gdt, Tensor residual, std::vector<Tensor> sums, Tensor g_states, Tensor tape,
                     std::vector<Tensor> parameters, Tensor numbers, Tensor dt, int64_t begin, int64_t end, int64_t options) {
  check_states(later, {&later, &gdt, &residual, &g_states, &tape, &dt}, parameters, numbers);
  const auto run = [&]<class T>(T) {
    StatesCall<T> call(parameters, numbers, options);
    call.p.B = later.size(0);
    call.set_steps(dt, tape, begin, end);
    call.p.later = data<T>(later);
    call.p.gdt = data<T>(gdt);
    call.p.residual = data<T>(residual);
    call.p.g_states = data<T>(g_states);
    call.tasks(double(end - begin) * call.p.n_sub * (call.p.implicit ? 4 : 1), sums,
               [&](i64 row, i64 last, i64 rows, T* scratch, const MechanicalSums<T>* own) {
                 call.kernels.states_backward(call.p, row, last, rows, scratch, own);
               });
  };
  later.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

void states_gradient(Tensor gradient, Tensor z, std::vector<Tensor> parameters, Tensor numbers, int64_t options) {
  check_states(z, {&gradient, &z}, parameters, numbers);
  const auto run = [&]<class T>(T) {
    StatesCall<T> call(parameters, numbers, options);
    call.p.B = z.size(0);
    call.p.z = data<T>(z);
    call.p.gradient = data<T>(gradient);
    call.tiles(1, [&](i64 row, i64 last, i64 rows, T* scratch) {
      call.kernels.states_gradient(call.p, row, last, rows, scratch);
    });
  };
  z.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

// given: cotangents of the gradient and of H, or nothing.
void states_gradient_backward(Tensor g_z, std::vector<Tensor> sums, std::vector<Tensor> given, Tensor z,
                              std::vector<Tensor> parameters, Tensor numbers, int64_t options) {
  check_states(z, {&g_z, &given.at(0), &given.at(1), &z}, parameters, numbers);
  const auto run = [&]<class T>(T) {
    StatesCall<T> call(parameters, numbers, options);
    call.p.B = z.size(0);
    call.p.z = data<T>(z);
    call.p.v = data<T>(given[0]);
    call.p.e = data<T>(given[1]);
    call.p.g_z = data<T>(g_z);
    call.tasks(1, sums, [&](i64 row, i64 last, i64 rows, T* scratch, const MechanicalSums<T>* own) {
      call.kernels.states_gradient_backward(call.p, row, last, rows, scratch, own);
    });
  };
  z.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}
