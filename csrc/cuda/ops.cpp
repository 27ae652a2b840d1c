// The operators hjepa_fast_cuda::forward and backward: they fill in a Problem and launch it on PyTorch's current stream, and
// return "", or why the device does not take it: then nothing was written. Every tensor but dt is contiguous, and made by the
// caller (hjepa_fast/backends/cuda.py), which also makes their device the current one.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"

#ifndef HJEPA_LIBRARY
#define HJEPA_LIBRARY hjepa_fast_cuda
#endif

namespace hjepa_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.data_ptr()) : nullptr;
}

// What both directions have in common, in the schema's order.
struct Common {
  std::vector<Tensor> matrices;
  Tensor vectors, dt;
  std::vector<double> moves;
  std::vector<int64_t> widths;
  int64_t kind;
  double beta, threshold;
  int64_t variant, team, rows;
};

Problem problem_of(const Tensor& a, const Tensor& tape, const Common& in, std::initializer_list<const Tensor*> others) {
  const std::size_t L = in.widths.size(), n_sub = in.moves.size() / 2;
  STD_TORCH_CHECK(L > 0 && L <= MAX_LAYERS && in.matrices.size() == L, "hjepa_fast_cuda: ", L, " layers, ",
                  in.matrices.size(), " matrices; 1 to ", MAX_LAYERS, " of each expected");
  STD_TORCH_CHECK(n_sub > 0 && n_sub <= MAX_SUB_STEPS, "hjepa_fast_cuda: ", n_sub, " sub-steps; 1 to ", MAX_SUB_STEPS,
                  " expected");
  const auto check = [&](const Tensor& x) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.get_device_index() == a.get_device_index() &&
                        (&x == &in.dt || x.is_contiguous()),
                    "hjepa_fast_cuda: contiguous float32 tensors of one device expected");
  };
  for (const Tensor* x : others) check(*x);
  for (const Tensor* x : {&a, &tape, &in.vectors, &in.dt}) check(*x);

  Problem p{};
  p.L = int(L);
  p.activation = {int(in.kind), float(in.beta), float(in.threshold)};
  for (int l = 0; l < p.L; ++l) p.width[l] = int(in.widths[l]);
  const auto dtype = in.matrices[0].scalar_type();
  for (int j = 0; j < p.L; ++j) {
    const Tensor& matrix = in.matrices[j];
    STD_TORCH_CHECK((dtype == ScalarType::BFloat16 || dtype == ScalarType::Float) && matrix.scalar_type() == dtype &&
                        matrix.is_contiguous() && matrix.get_device_index() == a.get_device_index() &&
                        matrix.size(0) == p.width[p.target(j)] && matrix.size(1) == padded(p.columns(j)),
                    "hjepa_fast_cuda: unlike matrices");
    p.matrix[j] = matrix.data_ptr();
  }
  p.vectors = data<float>(in.vectors);
  p.B = int(a.size(0));
  p.n_sub = int(n_sub);
  p.n_steps = in.dt.size(1);
  for (int i = 0; i < p.n_sub; ++i) {
    p.kick[i] = float(in.moves[2 * i]);
    p.drift[i] = float(in.moves[2 * i + 1]);
  }
  p.dt = data<float>(in.dt);
  p.dt_stride = in.dt.size(0) == 1 ? 0 : in.dt.stride(0);
  p.dt_step = in.dt.stride(1);
  p.tape_width = int(tape.size(3));
  p.tape = data<float>(tape);
  return p;
}

// "", or why the device does not do it.
std::string run(Problem& p, const Tensor& a, const Common& in) {
  const bool bf16 = in.matrices[0].scalar_type() == ScalarType::BFloat16;
  Wish wish{int(in.variant), int(in.team), int(in.rows)};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(a.get_device_index(), &stream));
  for (std::string before;;) {
    const Choice choice = choose(p, bf16, wish);
    if (choice.how == How::NOT) return before + choice.why_not;
    const bool cluster = choice.how == How::CLUSTERS;
    // kept until after the launch; PyTorch gives their memory to no other stream's work before that is done
    Tensor exchange = torch::stable::new_empty(a, {cluster ? 0 : exchange_size(p)});
    Tensor flags = torch::stable::new_zeros(a, {cluster ? 0 : flags_size(p)}, ScalarType::Int);
    p.exchange = data<float>(exchange);
    p.flags = data<unsigned>(flags);
    const std::string refused = launch(p, bf16, cluster, stream);
    if (refused.empty()) return "";
    if (!cluster || wish.variant) return before + refused;
    before = refused + "; ";
    wish.variant = 2;
  }
}

std::string forward(Tensor end, Tensor sq, Tensor sp, Tensor energy, Tensor tape, Tensor a, std::vector<Tensor> matrices,
                    Tensor vectors, Tensor dt, std::vector<double> moves, std::vector<int64_t> widths, int64_t kind,
                    double beta, double threshold, int64_t variant, int64_t team, int64_t rows) {
  const Common in{matrices, vectors, dt, moves, widths, kind, beta, threshold, variant, team, rows};
  Problem p = problem_of(a, tape, in, {&end, &sq, &sp, &energy});
  p.every_state = sq.size(1) == p.n_steps;
  p.a = data<float>(a);
  p.end = data<float>(end);
  p.sq = data<float>(sq);
  p.sp = data<float>(sp);
  p.energy = data<float>(energy);
  return run(p, a, in);
}

std::string backward(Tensor la_before, Tensor lsq_before, Tensor lsp_before, Tensor gdt, Tensor factors, Tensor la,
                     Tensor lsq, Tensor lsp, Tensor gsq, Tensor gsp, Tensor gE, Tensor tape, int64_t tape_begin,
                     int64_t begin, int64_t end, std::vector<Tensor> matrices, Tensor vectors, Tensor dt,
                     std::vector<double> moves, std::vector<int64_t> widths, int64_t kind, double beta, double threshold,
                     int64_t variant, int64_t team, int64_t rows) {
  const Common in{matrices, vectors, dt, moves, widths, kind, beta, threshold, variant, team, rows};
  Problem p = problem_of(la, tape, in, {&la_before, &lsq_before, &lsp_before, &gdt, &factors, &lsq, &lsp, &gsq, &gsp, &gE});
  p.back = true;
  p.la = data<float>(la);
  p.lsq = data<float>(lsq);
  p.lsp = data<float>(lsp);
  p.la_before = data<float>(la_before);
  p.lsq_before = data<float>(lsq_before);
  p.lsp_before = data<float>(lsp_before);
  p.gdt = data<float>(gdt);
  p.factors = data<float>(factors);
  p.gsq = data<float>(gsq);
  p.gsp = data<float>(gsp);
  p.gE = data<float>(gE);
  p.begin_step = begin;
  p.end_step = end;
  p.tape_begin = tape_begin;
  p.tape_steps = tape.size(1);
  return run(p, la, in);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(HJEPA_LIBRARY, m) {
  m.def(
      "forward(Tensor(a!) end, Tensor(b!) sq, Tensor(c!) sp, Tensor(d!) energy, Tensor(e!) tape, Tensor a, Tensor[] matrices, "
      "Tensor vectors, Tensor dt, float[] moves, int[] widths, int activation, float beta, float threshold, int variant, "
      "int team, int rows) -> str");
  m.def(
      "backward(Tensor(a!) la_before, Tensor(b!) lsq_before, Tensor(c!) lsp_before, Tensor(d!) gdt, Tensor(e!) factors, "
      "Tensor la, Tensor lsq, Tensor lsp, Tensor gsq, Tensor gsp, Tensor gE, Tensor tape, int tape_begin, int begin, int end, Tensor[] matrices, Tensor vectors, Tensor dt, "
      "float[] moves, int[] widths, int activation, float beta, float threshold, int variant, int team, int rows) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(HJEPA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace hjepa_fast::cuda
