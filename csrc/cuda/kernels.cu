// The kernel in all its variants, which one to launch, and how.

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace hjepa_fast::cuda {

template <class Loop>
__global__ void __launch_bounds__(MAX_THREADS, 1) run(const __grid_constant__ Problem p) {
#if __CUDA_ARCH__ < 900
  if constexpr (Loop::CLUSTER) {
    __trap();  // never launched: such a device has no clusters
    return;
  } else
#endif
    Loop(p).run();
}

namespace {

using Kernel = void (*)(Problem);

template <template <class, int, class> class Loop, class W, class Team>
Kernel kernel_of(int rows) {
  return rows == 1 ? run<Loop<W, 1, Team>> : rows == 4 ? run<Loop<W, 4, Team>> : run<Loop<W, 8, Team>>;
}

template <template <class, int, class> class Loop>
Kernel kernel_of(int rows, bool bf16, bool cluster) {
  if (bf16) return cluster ? kernel_of<Loop, bf16_t, Cluster>(rows) : kernel_of<Loop, bf16_t, Grid>(rows);
  return cluster ? kernel_of<Loop, float, Cluster>(rows) : kernel_of<Loop, float, Grid>(rows);
}

Kernel kernel_of(const Problem& p, bool bf16, bool cluster) {
  return p.back ? kernel_of<Backward>(p.rows, bf16, cluster) : kernel_of<Forward>(p.rows, bf16, cluster);
}

std::string asked(const Problem& p, bool bf16, bool cluster) {
  return std::to_string(p.n_teams) + (cluster ? " clusters of " : " teams of ") + std::to_string(p.team) + " blocks, " +
         std::to_string(p.rows) + (bf16 ? " samples each, bfloat16 weights, " : " samples each, float32 weights, ") +
         std::to_string(p.shared_size * sizeof(float)) + " bytes of shared memory a block";
}

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here and must not be found by whoever asks next
  throw std::runtime_error("hjepa_fast: " + what + ": " + cudaGetErrorString(error));
}

struct Device {
  int id, multiprocessors, most_shared;
  bool clusters, cooperative;
};

Device device() {
  Device d;
  check(cudaGetDevice(&d.id), "no CUDA device");
  int major, cooperative;
  check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, d.id), "number of multiprocessors");
  check(cudaDeviceGetAttribute(&d.most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, d.id), "size of shared memory");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d.id), "compute capability");
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, d.id), "cooperative launch");
  d.clusters = major >= 9;
  d.cooperative = cooperative;
  return d;
}

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(const Problem& p, bool cluster, cudaStream_t stream) {
    config.gridDim = dim3(p.n_teams * p.team);
    config.blockDim = dim3(MAX_THREADS);
    config.dynamicSmemBytes = p.shared_size * sizeof(float);
    config.stream = stream;
    if (cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = p.team;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

cudaError_t prepare(Kernel kernel, const Problem& p, bool cluster) {
  const auto function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(p.shared_size * sizeof(float)));
  if (error == cudaSuccess && cluster && p.team > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// How many of p's clusters the device runs at the same time; 0 where it knows no such cluster.
int most_clusters(const Problem& p, bool bf16, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, bool, bool, int, int, int>, int> known;
  const std::lock_guard lock(mutex);
  const auto key = std::make_tuple(device, p.back, bf16, p.rows, p.team, p.shared_size);
  if (const auto at = known.find(key); at != known.end()) return at->second;
  const Kernel kernel = kernel_of(p, bf16, true);
  int n = 0;
  const Launch launch(p, true, nullptr);
  if (prepare(kernel, p, true) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&n, reinterpret_cast<const void*>(kernel), &launch.config) != cudaSuccess) {
    cudaGetLastError();
    n = 0;
  }
  return known[key] = n;
}

// 1, 4 or 8 samples are taken together: with 2 a team would be done hardly earlier than with 4.
int more(int rows) { return rows == 1 ? 4 : 2 * rows; }
int fewer(int rows) { return rows == 8 ? 4 : rows / 4; }

int teams_of(int B, int rows) { return (B + rows - 1) / rows; }

// A block needs some features of the widest layer, or the barrier takes longer than what it saves.
int most_blocks(const Problem& p, int features) {
  return (*std::max_element(p.width, p.width + p.L) + features - 1) / features;
}

bool choose_clusters(Problem& p, bool bf16, const Wish& wish, const Device& d) {
  if (!d.clusters) return false;
  int largest = 16;
  while (largest > 1 && largest / 2 >= most_blocks(p, 16)) largest /= 2;
  for (int team = wish.team ? wish.team : largest; team; team = wish.team ? 0 : team / 2) {
    int rows = 0;
    // the fewest samples with which all clusters run at once, or as many as there is room for
    for (int r = wish.rows ? wish.rows : 1; r <= (wish.rows ? wish.rows : MOST_ROWS); r = more(r)) {
      if (!lay_out(p, r, team, teams_of(p.B, r), MAX_THREADS, true, bf16 ? 2 : 4, d.most_shared)) break;
      const int n = most_clusters(p, bf16, d.id);
      if (n) rows = r;
      if (n >= p.n_teams) break;
    }
    if (rows) return lay_out(p, rows, team, teams_of(p.B, rows), MAX_THREADS, true, bf16 ? 2 : 4, d.most_shared);
  }
  return false;
}

bool everything_fits(const Problem& p) { return *std::min_element(p.matrix_at, p.matrix_at + p.L) >= 0; }

bool choose_grid(Problem& p, bool bf16, const Wish& wish, const Device& d) {
  constexpr int FEWEST_BLOCKS = 16;
  if (!d.cooperative) return false;
  const int most_teams = std::max(1, d.multiprocessors / FEWEST_BLOCKS);
  int rows = wish.rows ? wish.rows : 1;
  while (!wish.rows && rows < MOST_ROWS && teams_of(p.B, rows) > most_teams) rows = more(rows);
  for (; rows; rows = wish.rows ? 0 : fewer(rows)) {
    const int n_teams = std::min(teams_of(p.B, rows), wish.team ? std::max(1, d.multiprocessors / wish.team) : most_teams);
    const int team = wish.team ? wish.team : std::min({d.multiprocessors / n_teams, MAX_THREADS, most_blocks(p, 4)});
    if (lay_out(p, rows, team, n_teams, MAX_THREADS, false, bf16 ? 2 : 4, d.most_shared)) return true;
  }
  return false;
}

}  // namespace

bool choose(Problem& p, bool bf16, const Wish& wish) {
  const Device d = device();
  if (wish.variant != 2 && choose_clusters(p, bf16, wish, d) && (wish.variant == 1 || everything_fits(p))) return true;
  if (wish.variant != 1 && choose_grid(p, bf16, wish, d)) return false;
  throw std::runtime_error("hjepa_fast: the device cannot run this rollout in one launch: widths up to " +
                           std::to_string(*std::max_element(p.width, p.width + p.L)) + ", " +
                           std::to_string(d.most_shared) + " bytes of shared memory a block, " +
                           (d.clusters ? "clusters, " : "no clusters, ") +
                           (d.cooperative ? "cooperative launches" : "no cooperative launches"));
}

void launch(const Problem& p, bool bf16, bool cluster, void* stream) {
  const Kernel kernel = kernel_of(p, bf16, cluster);
  const Launch launch(p, cluster, static_cast<cudaStream_t>(stream));
  check(prepare(kernel, p, cluster), asked(p, bf16, cluster));
  check(cudaLaunchKernelEx(&launch.config, kernel, p), asked(p, bf16, cluster));
}

}  // namespace hjepa_fast::cuda
