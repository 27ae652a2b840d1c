// The operators of grad F: included by ops.cpp, whose helpers they use.
#pragma once

// parameters: weights, then biases. numbers: of each hidden layer's activation its kind, beta and threshold.
constexpr const char* GRADIENT =
    "gradient(Tensor(a!) gradient, Tensor(b!) value, Tensor(c!) tape, Tensor x, Tensor[] parameters, "
    "Tensor numbers, int options) -> ()";
constexpr const char* GRADIENT_BACKWARD =
    "gradient_backward(Tensor(a!) g_x, Tensor(b!)[] sums, Tensor(c!)[] factors, Tensor[] given, Tensor tape, Tensor x, "
    "Tensor[] parameters, Tensor numbers, int options) -> ()";

struct GradientArguments {
  const Tensor &tape, &x, &numbers;
  std::vector<Tensor> weights, biases;
  Options options;

  GradientArguments(const Tensor& tape, const Tensor& x, const std::vector<Tensor>& parameters, const Tensor& numbers,
                    i64 options)
      : tape(tape), x(x), numbers(numbers), weights(parameters.begin(), parameters.begin() + parameters.size() / 2),
        biases(parameters.begin() + parameters.size() / 2, parameters.end()), options{options} {}
};

// The memory of a call, and what it computes.
template <class T>
struct GradientCall {
  const GradientArguments& in;
  const std::vector<Tensor> tail_weights, tail_biases;
  const Kernels<T>& kernels;
  Gradient<T> g{};

  explicit GradientCall(const GradientArguments& in)
      : in(in), tail_weights(in.weights.begin() + 1, in.weights.end()), tail_biases(in.biases.begin() + 1, in.biases.end()),
        kernels(kernels_for<T>(in.options.isa(), in.options.bf16())) {
    const bool keep = in.tape.size(1) > 0;
    take_activations(g.net.activation, int(tail_weights.size()), data<double>(in.numbers));
    take_network(g.net, tail_weights, keep, true);
    g.net.tape_layers = keep;
    g.B = in.x.size(0);
    g.tape = data<T>(in.tape);
    g.n = in.x.size(1);
    g.x = data<T>(in.x);
  }

  double work() const {
    double each = 2.0 * g.n * g.net.width[0];
    for (int l = 0; l + 1 < g.net.L; ++l) each += 2.0 * g.net.width[l] * g.net.width[l + 1];
    return each * g.B;
  }

  std::vector<Pack<T>> take(Memory& memory) {
    Weights<T>{tail_weights, tail_biases, kernels}.take_padded(g.net, memory);
    Packer<T> packer{kernels, memory, g.B > FEW_ROWS, g.B > SOME_ROWS};
    packer.take(g.net, tail_weights);
    g.by_WT = packer(in.weights[0], true);
    g.by_W = packer(in.weights[0], false);
    g.b = padded(in.biases[0], kernels, memory);
    return packer.packs;
  }

  void forward(Tensor& gradient, Tensor& value) {
    g.gradient = data<T>(gradient);
    g.value = data<T>(value);
    const double work = this->work();
    Team team(work < WORTH_A_THREAD ? 1 : int(in.options.n_threads()), work);
    const i64 rounds = (g.B + kernels.tile_rows * team.size() - 1) / (kernels.tile_rows * team.size());
    const i64 n_tiles = std::min(rounds * team.size(), g.B), rows = (g.B + n_tiles - 1) / n_tiles;
    std::vector<T*> scratch(team.size());
    std::vector<Pack<T>> packs;
    lay_out(team, [&](Memory& memory) {
      packs = take(memory);
      for (T*& own : scratch) own = memory.template take<T>(kernels.gradient_scratch(g, rows));
    });
    run(packs, team, kernels);
    share_out(team, n_tiles, [&](i64 i, int thread) {
      const i64 from = g.B * i / n_tiles, to = g.B * (i + 1) / n_tiles;
      kernels.gradient(g, from, to - from, scratch[thread]);
    });
  }

  // sums: of b, b_2, ..., the output weights; and of the other weights, W first, or factors: delta, nu, left and right of each
  // layer between; or none of both
  void backward(Tensor& g_x, const std::vector<Tensor>& sums, const std::vector<Tensor>& factors, const Tensor& g_gradient,
                const Tensor& g_value) {
    if (!factors.empty()) {
      g.delta = data<T>(factors[0]);
      g.nu = data<T>(factors[1]);
      for (int l = 0; l + 1 < g.net.L; ++l) {
        g.left[l] = data<T>(factors[2 + 2 * l]);
        g.right[l] = data<T>(factors[3 + 2 * l]);
      }
    }
    g.g_x = data<T>(g_x);
    g.g_gradient = data<T>(g_gradient);
    g.g_value = data<T>(g_value);
    const double work = this->work();
    // as in backward_as: tasks, and with them the order of summation, do not depend on how many threads there are
    const i64 n_tasks = work < WORTH_A_THREAD ? 1 : std::min(in.options.n_threads(), g.B),
              share = (g.B + n_tasks - 1) / n_tasks;
    const i64 tiles = (share + kernels.tile_rows - 1) / kernels.tile_rows, rows = (share + tiles - 1) / tiles;
    Team team(int(n_tasks), 3 * work);
    std::vector<T*> scratch(team.size());
    std::vector<GradientSums<T>> task_sums(sums.empty() ? 0 : n_tasks);
    std::vector<Pack<T>> packs;
    std::vector<Part<T>> parts;
    lay_out(team, [&](Memory& memory) {
      packs = take(memory);
      for (T*& own : scratch) own = memory.template take<T>(kernels.gradient_backward_scratch(g, rows, !sums.empty()));
      if (sums.empty()) return;
      parts.clear();
      const auto add = [&](const Tensor& total, auto of) {
        parts.push_back(part_of<T>(total, task_sums, of, memory, kernels));
      };
      add(sums[0], [](GradientSums<T>& own) -> T*& { return own.b; });
      const int last = g.net.L - 1;
      for (int l = 0; l <= last; ++l) add(sums[1 + l], [=](GradientSums<T>& own) -> T*& { return own.tail.b[l]; });
      add(sums[2 + last], [=](GradientSums<T>& own) -> T*& { return own.tail.W[last]; });
      if (!factors.empty()) return;
      parts.push_back(part_of<T>(
          sums[3 + last], task_sums, [](GradientSums<T>& own) -> T*& { return own.W; }, memory, kernels, g.n < g.NARROW));
      for (int l = 0; l < last; ++l) add(sums[4 + last + l], [=](GradientSums<T>& own) -> T*& { return own.tail.W[l]; });
    });
    run(packs, team, kernels);
    clear(parts, team, kernels);
    share_out(team, n_tasks, [&](i64 i, int thread) {
      kernels.gradient_backward(g, g.B * i / n_tasks, g.B * (i + 1) / n_tasks, rows, scratch[thread],
                                sums.empty() ? nullptr : &task_sums[i]);
    });
    add_up(parts, team, kernels, true);
  }
};

void check(const std::vector<const Tensor*>& tensors, const GradientArguments& in) {
  STD_TORCH_CHECK(in.weights.size() > 1 && in.weights.size() <= MAX_LAYERS, "hjepa_fast_cpp: unsupported number of layers");
  const auto dtype = in.x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "hjepa_fast_cpp: float32 or float64 expected");
  STD_TORCH_CHECK(in.numbers.scalar_type() == ScalarType::Double && in.numbers.is_contiguous() &&
                      in.numbers.numel() == 3 * i64(in.weights.size() - 1),
                  "hjepa_fast_cpp: numbers must be float64");
  for (const auto* list : {&in.weights, &in.biases})
    for (const Tensor& y : *list)
      STD_TORCH_CHECK(y.scalar_type() == dtype && y.is_contiguous() && y.is_cpu(), "hjepa_fast_cpp: unlike parameters");
  for (const Tensor* y : tensors)
    STD_TORCH_CHECK(y->scalar_type() == dtype && y->is_contiguous() && y->is_cpu(), "hjepa_fast_cpp: unlike tensors");
}

void gradient(Tensor gradient, Tensor value, Tensor tape, Tensor x, std::vector<Tensor> parameters, Tensor numbers,
              int64_t options) {
  const GradientArguments in(tape, x, parameters, numbers, options);
  check({&gradient, &value, &tape, &x}, in);
  expect_writes({&gradient, &tape});
  const auto run = [&]<class T>(T) { GradientCall<T>(in).forward(gradient, value); };
  x.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

// given: cotangents of the gradient and of the value, or nothing.
void gradient_backward(Tensor g_x, std::vector<Tensor> sums, std::vector<Tensor> factors, std::vector<Tensor> given,
                       Tensor tape, Tensor x, std::vector<Tensor> parameters, Tensor numbers, int64_t options) {
  const GradientArguments in(tape, x, parameters, numbers, options);
  const Tensor &g_gradient = given.at(0), &g_value = given.at(1);
  check({&g_x, &g_gradient, &g_value, &tape, &x}, in);
  const auto run = [&]<class T>(T) { GradientCall<T>(in).backward(g_x, sums, factors, g_gradient, g_value); };
  x.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}
