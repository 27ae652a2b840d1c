// kernels.h on the CPU, for tests; see emulate.h. Linked with ops.cpp, it is the whole backend without a GPU.

#include "kernels.h"

#include <string>

#include "backward.h"
#include "choose.h"
#include "forward.h"

namespace hjepa_fast::cuda {
namespace {

// what the test sets
struct {
  int n_threads = 64, n_teams = 0;
  unsigned order = 0;
  std::size_t most_shared = 227 << 10;
  bool refuse_clusters = false, refuse_grid = false;
  // of the last launch: bytes a block, and matrices in them; how many samples' turns its longest team took
  std::size_t shared = 0, in_shared = 0, turns = 0;
} settings;

template <class W, int R, class Team>
void run_block(const Problem& p) {
  p.back ? Backward<W, R, Team>(p).run() : Forward<W, R, Team>(p).run();
}

template <class W, int R>
void run(const Problem& p, bool cluster) {
  emulated::run(p.n_teams * p.team, settings.n_threads, cluster ? p.team : 1, p.shared_size, settings.order,
                [&] { (cluster ? run_block<W, R, Cluster> : run_block<W, R, Grid>)(p); });
}

template <class W>
void run(const Problem& p, bool cluster) {
  (p.rows == 1 ? run<W, 1> : p.rows == 4 ? run<W, 4> : run<W, 8>)(p, cluster);
}

}  // namespace

Choice choose(Problem& p, bool bf16, const Wish& wish) {
  const int n_groups = (p.B + wish.rows - 1) / wish.rows, n_teams = settings.n_teams ? settings.n_teams : n_groups;
  const bool cluster = wish.variant < 2;
  if (!lay_out(p, wish.rows, wish.team, n_teams, settings.n_threads, cluster, bf16 ? 2 : 4, settings.most_shared))
    return {How::NOT, "too little shared memory"};
  settings.shared = p.shared_size * sizeof(float);
  settings.in_shared = std::count_if(p.matrix_at, p.matrix_at + p.L, [](int at) { return at >= 0; });
  settings.turns = (n_groups + n_teams - 1) / n_teams;
  return {cluster ? How::CLUSTERS : How::GRID, ""};
}

std::string launch(const Problem& p, bool bf16, bool cluster, void*) {
  if (cluster ? settings.refuse_clusters : settings.refuse_grid) return cluster ? "no clusters today" : "no grid today";
  (bf16 ? run<bf16_t> : run<float>)(p, cluster);
  return "";
}

}  // namespace hjepa_fast::cuda

extern "C" void set_emulated(int n_threads, int n_teams, unsigned order, long most_shared) {
  auto& s = hjepa_fast::cuda::settings;
  s.n_threads = n_threads, s.n_teams = n_teams, s.order = order, s.most_shared = most_shared;
}
extern "C" void refuse(int clusters, int grid) {
  auto& s = hjepa_fast::cuda::settings;
  s.refuse_clusters = clusters, s.refuse_grid = grid;
}
extern "C" int counter_reached(unsigned seen, unsigned value) { return hjepa_fast::cuda::reached(seen, value); }
extern "C" long turns_of_a_team() { return hjepa_fast::cuda::settings.turns; }
extern "C" long emulated_shared() { return hjepa_fast::cuda::settings.shared; }
extern "C" long matrices_in_shared() { return hjepa_fast::cuda::settings.in_shared; }

// What would be chosen on a device with `multiprocessors`, `most_shared` bytes and clusters of up to `largest` blocks, to
// `out`: whether clusters, blocks of a team, samples of one, teams, matrices in shared memory.
extern "C" void chosen_on(int multiprocessors, long most_shared, int largest, int L, const int* width, int B, int bf16,
                          int back, int* out) {
  using namespace hjepa_fast::cuda;
  Problem p{};
  p.L = L;
  p.B = B;
  p.back = back;
  std::copy_n(width, L, p.width);
  const auto clusters = [&](const Problem& p) { return p.team <= largest ? multiprocessors / p.team : 0; };
  const Device device{multiprocessors, std::size_t(most_shared), true, clusters};
  const Wish wish{};
  Chooser chooser(p, bf16, wish, device);
  out[0] = chooser.choose().how == How::CLUSTERS;
  out[1] = p.team, out[2] = p.rows, out[3] = p.n_teams, out[4] = int(chooser.in_shared());
}

// PyTorch for the CPU lacks this
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }
