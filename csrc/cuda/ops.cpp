// The operator hjepa_fast_cuda::forward: it fills in a Problem and launches it on PyTorch's current stream. Every tensor is
// contiguous and made by the caller (hjepa_fast/backends/cuda.py), which also makes their device the current one.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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

void forward(Tensor end, Tensor sq, Tensor sp, Tensor energy, Tensor tape, Tensor a, std::vector<Tensor> matrices,
             Tensor vectors, Tensor dt, std::vector<double> moves, std::vector<int64_t> widths, int64_t kind, double beta,
             double threshold, int64_t variant, int64_t team, int64_t rows) {
  const std::size_t L = widths.size(), n_sub = moves.size() / 2;
  STD_TORCH_CHECK(L > 0 && L <= MAX_LAYERS && matrices.size() == L, "hjepa_fast_cuda: ", L, " layers, ", matrices.size(),
                  " matrices; 1 to ", MAX_LAYERS, " of each expected");
  STD_TORCH_CHECK(n_sub > 0 && n_sub <= MAX_SUB_STEPS, "hjepa_fast_cuda: ", n_sub, " sub-steps; 1 to ", MAX_SUB_STEPS,
                  " expected");
  for (const Tensor* x : {&end, &sq, &sp, &energy, &tape, &a, &vectors, &dt})
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->get_device_index() == a.get_device_index(),
                    "hjepa_fast_cuda: contiguous float32 tensors of one device expected");
  const bool bf16 = matrices[0].scalar_type() == ScalarType::BFloat16;

  Problem p{};
  p.L = int(L);
  p.activation = {int(kind), float(beta), float(threshold)};
  for (int l = 0; l < p.L; ++l) p.width[l] = int(widths[l]);
  for (int j = 0; j < p.L; ++j) {
    const Tensor& matrix = matrices[j];
    STD_TORCH_CHECK(matrix.scalar_type() == (bf16 ? ScalarType::BFloat16 : ScalarType::Float) && matrix.is_contiguous() &&
                        matrix.get_device_index() == a.get_device_index() && matrix.size(0) == p.width[p.target(j)] &&
                        matrix.size(1) == padded(p.columns(j)),
                    "hjepa_fast_cuda: unlike matrices");
    p.matrix[j] = matrix.data_ptr();
  }
  p.vectors = data<float>(vectors);
  p.B = int(a.size(0));
  p.n_sub = int(n_sub);
  p.n_steps = dt.size(1);
  for (int i = 0; i < p.n_sub; ++i) {
    p.kick[i] = float(moves[2 * i]);
    p.drift[i] = float(moves[2 * i + 1]);
  }
  p.dt = data<float>(dt);
  p.dt_stride = dt.size(0) == 1 ? 0 : p.n_steps;
  p.every_state = sq.size(1) == p.n_steps;
  p.tape_width = int(tape.size(3));
  p.a = data<float>(a);
  p.end = data<float>(end);
  p.sq = data<float>(sq);
  p.sp = data<float>(sp);
  p.energy = data<float>(energy);
  p.tape = data<float>(tape);

  const bool cluster = choose(p, bf16, {int(variant), int(team), int(rows)});
  // kept until after the launch; PyTorch gives their memory to no other stream's work before that is done
  Tensor exchange = torch::stable::new_empty(a, {cluster ? 0 : exchange_size(p)});
  Tensor flags = torch::stable::new_zeros(a, {cluster ? 0 : flags_size(p)}, ScalarType::Int);
  p.exchange = data<float>(exchange);
  p.flags = data<int>(flags);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(a.get_device_index(), &stream));
  launch(p, bf16, cluster, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(HJEPA_LIBRARY, m) {
  m.def(
      "forward(Tensor(a!) end, Tensor(b!) sq, Tensor(c!) sp, Tensor(d!) energy, Tensor(e!) tape, Tensor a, Tensor[] matrices, "
      "Tensor vectors, Tensor dt, float[] moves, int[] widths, int activation, float beta, float threshold, int variant, "
      "int team, int rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(HJEPA_LIBRARY, CompositeExplicitAutograd, m) { m.impl("forward", TORCH_BOX(&forward)); }

}  // namespace hjepa_fast::cuda
