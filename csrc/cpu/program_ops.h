// The operators that run programs: included by ops.cpp, whose helpers they use.
#pragma once

// parameters: the matrices that are no halves of first layers, then every network's weights and biases, then the externals. program:
// numbers that say the rest (hjepa_fast/backends/cpp.py writes them). cotangents: of the state, of what is known, of the externals.
#define PROGRAM_ARGUMENTS "Tensor tape, Tensor[] parameters, Tensor dt, Tensor program, int begin, int end, int options) -> ()"

constexpr const char* PROGRAM_FORWARD =
    "program_forward(Tensor(a!)[] out, Tensor(b!)[] path, Tensor(c!) energy, Tensor z0, Tensor[] start, " PROGRAM_ARGUMENTS;
constexpr const char* PROGRAM_BACKWARD =
    "program_backward(Tensor(a!)[] cotangents, Tensor(b!)[] values, Tensor(c!) gdt, Tensor(d!)[] sums, Tensor[] g_path, "
    "Tensor g_energy, Tensor z0, " PROGRAM_ARGUMENTS;

struct ProgramArguments {
  const Tensor& tape;
  const std::vector<Tensor>& parameters;
  const Tensor &dt, &program;
  i64 begin, end;
  Options options;
};

void check_program(const std::vector<std::vector<Tensor>>& lists, const ProgramArguments& in) {
  const auto dtype = in.dt.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "hjepa_fast_cpp: float32 or float64 expected");
  STD_TORCH_CHECK(in.program.scalar_type() == ScalarType::Double && in.program.is_contiguous(),
                  "hjepa_fast_cpp: program must be float64");
  STD_TORCH_CHECK(in.dt.is_contiguous() && in.tape.is_contiguous(), "hjepa_fast_cpp: dt and tape must be contiguous");
  for (const auto& list : lists)
    for (const Tensor& x : list)
      STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_cpu() && (x.dim() == 0 || x.stride(-1) == 1 || x.size(-1) <= 1),
                      "hjepa_fast_cpp: unlike tensors");
}

// Of a tape: a tile as large as this goes forward and back.
constexpr i64 AGAIN_BYTES = i64(1) << 21;

template <class T>
struct ProgramCall {
  const ProgramArguments& in;
  const Kernels<T>& kernels;
  Program<T> p{};
  std::vector<Line> lines{};
  std::vector<std::vector<Tensor>> weights{}, biases{};
  std::vector<Tensor> matrices{}, first{}, first_bias{}, externals{};
  int half_of[MAX_MATRICES];  // of which network's first layer a matrix is some columns, from `column` on; or -1
  i64 column[MAX_MATRICES];

  ProgramCall(const ProgramArguments& in, i64 batch, bool keep)
      : in(in), kernels(kernels_for<T>(in.options.isa(), in.options.bf16())) {
    const double* next = data<double>(in.program);
    const auto number = [&] { return i64(*next++); };
    p.n_registers = int(number());
    p.n_state = int(number());
    p.n_known = int(number());
    p.n_path = int(number());
    p.n_matrices = int(number());
    p.n_networks = int(number());
    p.n_items = int(number());
    for (int i = 0; i < p.n_registers; ++i) p.width[i] = number();
    for (int i = 0; i < p.n_state; ++i) p.state[i] = int(number());
    for (int i = 0; i < p.n_known; ++i) p.known[i] = int(number());
    for (int i = 0; i < p.n_path; ++i) p.path[i] = int(number());
    for (int i = number(); i > 0; --i) p.tracked[number()] = true;
    int n_given = 0;
    for (int m = 0; m < p.n_matrices; ++m) {
      half_of[m] = int(number());
      column[m] = number();
      n_given += half_of[m] < 0;
    }
    for (int i = 0; i < p.n_state; ++i) {
      Origin& origin = p.origin[i];
      origin.kind = decltype(origin.kind)(number());
      origin.from = number();
      origin.network = int(number());
    }
    auto rest = in.parameters.begin() + n_given;
    for (int n = 0; n < p.n_networks; ++n) {
      p.reg_a[n] = int(number());
      p.reg_d[n] = int(number());
      const i64 layers = number();
      first.push_back(*rest);
      first_bias.push_back(*(rest + layers));
      p.inner[n] = first.back().size(1);
      weights.emplace_back(rest + 1, rest + layers);
      biases.emplace_back(rest + layers + 1, rest + 2 * layers);
      rest += 2 * layers;
      next = take_activations(p.network[n].activation, int(layers) - 1, next);
      take_network(p.network[n], weights.back(), keep, in.options.layers());
    }
    externals.assign(rest, in.parameters.end());
    for (std::size_t i = 0; i < externals.size(); ++i) {
      const Tensor& e = externals[i];
      p.external[i] = {data<T>(e), e.size(0) > 1 ? e.stride(0) : 0, e.size(1) > 1 ? e.stride(1) : 0};
    }
    auto given = in.parameters.begin();
    for (int m = 0; m < p.n_matrices; ++m) matrices.push_back(half_of[m] < 0 ? *given++ : first[half_of[m]]);
    for (int i = 0; i < p.n_items; ++i) {
      Item& item = p.item[i];
      item.reg = int(number());
      item.network = number();
      item.first = number();
      item.later = number();
      item.end = number();
    }
    Code* codes[] = {&p.start, &p.first, &p.later, &p.last, &p.back_last, &p.back_later, &p.back_first};
    i64 all = 0;
    for (Code* code : codes) all += code->n = int(number());
    lines.resize(all);
    for (Line& x : lines) {
      x.op = int(number());
      x.x = int(number());
      x.y = int(number());
      x.c = *next++;
      x.scaled = number();
      x.matrix = int(number());
      x.transposed = number();
      x.item = int(number());
      x.slot = int(number());
      x.energy = int(number());
      x.meet = number();
    }
    for (const Line& x : lines) {
      if (x.op != TAKE && x.op != SCALE) continue;
      STD_TORCH_CHECK(x.item < int(externals.size()), "hjepa_fast_cpp: an external is missing");
      const Tensor& e = externals[x.item];
      const auto fits = [](i64 n, i64 all) { return n == 1 || n == all; };
      STD_TORCH_CHECK(e.dim() == 3 && fits(e.size(0), batch) && fits(e.size(1), in.dt.size(1)) && e.size(2) == p.width[x.y] &&
                          e.is_contiguous() && e.scalar_type() == in.dt.scalar_type(),
                      "hjepa_fast_cpp: an external must be [1 or batch, 1 or steps, width], contiguous and of dt's dtype");
    }
    const Line* at = lines.data();
    for (Code* code : codes) code->at = at, at += code->n;
    p.B = batch;
    p.n_steps = in.dt.size(1);
    p.begin = in.begin;
    p.end = in.end;
    p.every = in.options.every();
    p.dt = data<T>(in.dt);
    p.dt_stride = in.dt.size(0) == 1 ? 0 : p.n_steps;
    for (int i = 0; i < p.n_items; ++i) {
      Item& item = p.item[i];
      item.width = !keep ? 0 : item.network ? p.network[i].tape_width : p.width[item.reg];
      item.offset = p.tape_width;
      p.tape_width += item.width * (item.before(p.n_steps) + item.end);
    }
    p.tape = data<T>(in.tape);
  }

  template <class R>
  static void set(R* rows, const std::vector<Tensor>& tensors) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& x = tensors[i];
      rows[i] = {data<T>(x), x.dim() > 1 ? x.stride(0) : 0, x.dim() > 2 ? x.stride(1) : 0};
    }
  }

  // Of every register, or of the halves of the states, which then start with z0.
  void set_path(const std::vector<Tensor>& path) {
    if (path.size() != 1 || p.n_path != 2) return set(p.emit, path);
    const Tensor& states = path[0];
    for (int i = 0; i < p.n_path; ++i)
      for (int k = 0; k < p.n_state; ++k)
        if (p.state[k] == p.path[i]) p.emit[i] = {data<T>(states) + p.origin[k].from, states.stride(0), states.stride(1)};
    p.emit_start = p.every;
  }

  // Multiplications of one row in a later step: forward.
  double work() const {
    double all = 0;
    for (const Line* x = p.later.at; x != p.later.at + p.later.n; ++x) {
      if (x->op == ADD && x->matrix >= 0 && matrices[x->matrix].dim() > 1) all += double(p.width[x->x]) * p.width[x->y];
      if (x->op != EVALUATE) continue;
      const Net<T>& net = p.network[x->item];
      for (int l = 0; l + 1 < net.L; ++l) all += 2.0 * net.width[l] * net.width[l + 1];
    }
    return all;
  }

  // Of what a step multiplies with, each way.
  i64 weight_bytes() const {
    i64 numbers = 0;
    for (const Tensor& M : matrices) numbers += 2 * M.numel() / (M.dim() > 1 ? 1 : 2);
    for (const auto& own : weights)
      for (const Tensor& W : own) numbers += 2 * W.numel();
    return numbers * i64(sizeof(T));
  }

  // How often a row's evaluations use a weight in all.
  i64 uses(i64 rows) const { return rows * std::max<i64>(1, p.item[0].later) * (p.end - p.begin); }

  std::vector<Pack<T>> take(Memory& memory, bool back) {
    const i64 n = uses(p.B);
    const bool few = p.B <= FEW_ROWS && (n <= FEW_USES || weight_bytes() > CREW_BYTES), some = n <= SOME_ROWS;
    Packer<T> packer{kernels, memory, !few, !some};
    for (int n = 0; n < p.n_networks; ++n) {
      Weights<T>{weights[n], biases[n], kernels}.take_padded(p.network[n], memory);
      packer.take(p.network[n], weights[n]);
    }
    // first layers, transposed: for the start, and for the halves that moves are made with
    Right<T> whole[MAX_NETWORKS];
    for (int n = 0; n < p.n_networks; ++n) {
      p.first_WT[n] = whole[n] = packer(first[n], true);
      p.first_b[n] = padded(first_bias[n], kernels, memory);
    }
    bool straight[MAX_MATRICES] = {}, transposed[MAX_MATRICES] = {};
    const auto needs = [&](const Code& code) {
      for (const Line* x = code.at; x != code.at + code.n; ++x) {
        if (x->matrix < 0 || (x->op != ADD && x->op != ADJOINT)) continue;
        ((x->op == ADJOINT) != x->transposed ? transposed : straight)[x->matrix] = true;
      }
    };
    for (const Code* code : {&p.first, &p.later, &p.last}) needs(*code);
    if (back)
      for (const Code* code : {&p.back_last, &p.back_later, &p.back_first}) needs(*code);
    for (int m = 0; m < p.n_matrices; ++m) {
      const Tensor& M = matrices[m];
      p.matrix[m].n = M.size(0);
      if (M.dim() == 1) {
        T* to = memory.take<T>(kernels.ld(M.size(0)));
        if (memory.base) {
          for (i64 i = 0; i < M.size(0); ++i) to[i] = data<T>(M)[i * M.stride(0)];
          std::fill(to + M.size(0), to + kernels.ld(M.size(0)), T(0));
        }
        // while counting there is no memory, yet a diagonal must be known as one
        p.matrix[m].diagonal = memory.base ? to : data<T>(M);
        p.matrix[m].m = M.size(0);
        continue;
      }
      const int n = half_of[m];
      if (n < 0) {
        p.matrix[m].m = M.size(1);
        if (straight[m]) p.matrix[m].straight = packer(M, false);
        if (transposed[m]) p.matrix[m].transposed = packer(M, true);
        continue;
      }
      const i64 d = p.matrix[m].m = p.width[half_register(m)], from = column[m];
      if (straight[m]) p.matrix[m].straight = packer.columns(M, from, d);
      Right<T>& back = p.matrix[m].transposed = whole[n];
      // while counting there are no packed operands yet: not their addresses say what is packed
      if (!packer.transposed_too) {
        back.raw += from;
      } else if (from % kernels.depth) {
        if (transposed[m]) back = packer.columns(M, from, d, true);
      } else if (memory.base) {
        back.packed += from / kernels.depth * 2 * kernels.lanes;
      }
    }
    return packer.packs;
  }

  // A register of as many numbers as the half has columns: what it is multiplied with.
  int half_register(int m) const {
    for (const Line& x : lines)
      if (x.matrix == m && (x.op == ADD || x.op == ADJOINT)) return x.transposed ? x.x : x.y;
    return 0;
  }

  i64 narrowest() const { return kernels.n_panels(p.width[p.reg_a[0]]); }

  // Rows whose tape stays in the cache between the way there and the way back.
  i64 tile_rows_again() const {
    const i64 fit = AGAIN_BYTES / (p.tape_width * i64(sizeof(T)) + 1), quarter = kernels.tile_rows / 4;
    return std::clamp(fit / quarter * quarter, quarter, kernels.tile_rows);
  }

  void forward() {
    const double work = this->work() * p.B * (p.end - p.begin);
    const bool crew = wants_crew(p.B, CREW_ROWS, in.options.path(), weight_bytes());
    const i64 n_threads = work < (crew ? 2 : 1) * WORTH_A_THREAD ? 1 : in.options.n_threads();
    Team team(int(crew ? std::min(n_threads, narrowest()) : n_threads), work);
    const i64 rounds = (p.B + kernels.tile_rows * team.size() - 1) / (kernels.tile_rows * team.size());
    const i64 n_tiles = crew ? 1 : std::min(rounds * team.size(), p.B), rows = (p.B + n_tiles - 1) / n_tiles;
    const int n_scratch = crew ? 1 : team.size(), crew_size = crew ? team.size() : 1;
    std::vector<T*> scratch(n_scratch);
    std::vector<Pack<T>> packs;
    lay_out(team, [&](Memory& memory) {
      packs = take(memory, false);
      for (T*& own : scratch) own = memory.template take<T>(kernels.program_forward_scratch(p, rows, crew_size));
    });
    run(packs, team, kernels);
    run_tasks(team, p.end - p.begin, n_tiles, crew, [&](i64 i, int thread, int size, Barrier* barrier) {
      const i64 from = p.B * i / n_tiles, to = p.B * (i + 1) / n_tiles;
      kernels.program_forward(p, from, to - from, size > 1 ? thread : 0, size, barrier, scratch[crew ? 0 : thread]);
    });
  }

  // sums: of every matrix, then of every network's weights and biases; or none
  void backward(const std::vector<Tensor>& sums) {
    const i64 steps = p.end - p.begin;
    const double work = this->work() * p.B * steps;
    // as in backward_as: tasks, and with them the order of summation, do not depend on how many threads there are
    const bool crew = !p.again && wants_crew(p.B, CREW_ROWS_BACKWARD, in.options.path(), weight_bytes());
    const bool small = work < (crew ? 2 : 1) * WORTH_A_THREAD;
    const i64 n_tasks = small || crew ? 1 : std::min(in.options.n_threads(), p.B), share = (p.B + n_tasks - 1) / n_tasks;
    const i64 most = p.again ? tile_rows_again() : kernels.tile_rows;
    const i64 tiles = crew ? 1 : (share + most - 1) / most, rows = (share + tiles - 1) / tiles;
    Team team(int(crew && !small ? std::min(in.options.n_threads(), narrowest()) : n_tasks), 3 * work);
    const int n_scratch = crew ? 1 : team.size(), crew_size = crew ? team.size() : 1;
    std::vector<T*> scratch(n_scratch);
    std::vector<ProgramSums<T>> task_sums(sums.empty() ? 0 : n_tasks);
    std::vector<Pack<T>> packs;
    std::vector<Part<T>> parts;
    lay_out(team, [&](Memory& memory) {
      packs = take(memory, true);
      for (T*& own : scratch)
        own = memory.template take<T>(kernels.program_backward_scratch(p, rows, !sums.empty(), crew_size));
      if (sums.empty()) return;
      parts.clear();
      const auto add = [&](const Tensor& total, auto of) {
        parts.push_back(part_of<T>(total, task_sums, of, memory, kernels));
      };
      auto next = sums.begin();
      for (int m = 0; m < p.n_matrices; ++m) add(*next++, [m](ProgramSums<T>& own) -> T*& { return own.matrix[m]; });
      for (int n = 0; n < p.n_networks; ++n) {
        for (int l = 0; l < p.network[n].L; ++l) add(*next++, [=](ProgramSums<T>& own) -> T*& { return own.network[n].W[l]; });
        for (int l = 0; l < p.network[n].L; ++l) add(*next++, [=](ProgramSums<T>& own) -> T*& { return own.network[n].b[l]; });
      }
    });
    run(packs, team, kernels);
    clear(parts, team, kernels);
    run_tasks(team, steps, n_tasks, crew, [&](i64 i, int thread, int size, Barrier* barrier) {
      kernels.program_backward(p, p.B * i / n_tasks, p.B * (i + 1) / n_tasks, rows, size > 1 ? thread : 0, size, barrier,
                               scratch[crew ? 0 : thread], sums.empty() ? nullptr : &task_sums[i]);
    });
    add_up(parts, team, kernels, in.options.fresh());
  }
};

void program_forward(std::vector<Tensor> out, std::vector<Tensor> path, Tensor energy, Tensor z0, std::vector<Tensor> start,
                     Tensor tape, std::vector<Tensor> parameters, Tensor dt, Tensor program, int64_t begin, int64_t end,
                     int64_t options) {
  const ProgramArguments in{tape, parameters, dt, program, begin, end, {options}};
  check_program({out, path, start, {energy, tape, z0}}, in);
  expect_writes({&tape});
  for (const Tensor& x : path) expect_writes({&x});
  const auto run = [&]<class T>(T) {
    ProgramCall<T> call(in, z0.size(0), tape.numel() > 0);
    call.set(call.p.in, start);
    call.set(call.p.out, out);
    call.set_path(path);
    call.set(&call.p.z0, {z0});
    call.p.energy = data<T>(energy);
    call.forward();
  };
  dt.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

void program_backward(std::vector<Tensor> cotangents, std::vector<Tensor> values, Tensor gdt, std::vector<Tensor> sums,
                      std::vector<Tensor> g_path, Tensor g_energy, Tensor z0, Tensor tape, std::vector<Tensor> parameters,
                      Tensor dt, Tensor program, int64_t begin, int64_t end, int64_t options) {
  const ProgramArguments in{tape, parameters, dt, program, begin, end, {options}};
  check_program({cotangents, values, sums, g_path, {gdt, g_energy, tape, z0}}, in);
  const auto run = [&]<class T>(T) {
    ProgramCall<T> call(in, cotangents[0].size(0), true);
    call.set(call.p.cotangent, cotangents);
    const int n_own = call.p.n_state + call.p.n_known;
    for (int i = n_own; i < int(cotangents.size()); ++i) call.p.of_external[i - n_own] = call.p.cotangent[i];
    call.set(call.p.value, values);
    call.set(call.p.g_path, g_path);
    call.set(&call.p.z0, {z0});
    call.p.gE = data<T>(g_energy);
    call.p.gdt = data<T>(gdt);
    call.p.again = z0.numel() > 0;
    call.backward(sums);
  };
  dt.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}
