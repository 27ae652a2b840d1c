// The kernel in all its variants, which one to launch, and how.

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "backward.h"
#include "choose.h"
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

std::string text_of(cudaError_t error) { return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error); }

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here and must not be found by whoever asks next
  throw std::runtime_error("hjepa_fast: " + what + ": " + text_of(error) +
                           ". An earlier kernel may be the cause: CUDA_LAUNCH_BLOCKING=1 tells which");
}

// Whether the device does not take a launch that is right: others have some of its multiprocessors (MPS, green contexts), or
// no machine code is for it.
bool refused(cudaError_t error) {
  switch (error) {
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidClusterSize:
    case cudaErrorNotSupported:
    case cudaErrorNotPermitted:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
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

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "properties of device " + std::to_string(device));
  return value;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "no CUDA device");
  return device;
}

// What the kernel may be launched with. The device's own limit, not what p needs: another thread may launch the same kernel
// between this call and the launch.
cudaError_t prepare(Kernel kernel, const Problem& p, bool cluster) {
  const auto function = reinterpret_cast<const void*>(kernel);
  const int most_shared = attribute_of(current_device(), cudaDevAttrMaxSharedMemoryPerBlockOptin);
  cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
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
  const auto function = reinterpret_cast<const void*>(kernel);
  int n = 0;
  const Launch launch(p, true, nullptr);
  cudaFuncAttributes compiled{};
  // what was compiled for older devices, and by the driver for this one, has no clusters in it
  if (cudaFuncGetAttributes(&compiled, function) != cudaSuccess || compiled.ptxVersion < 90 ||
      prepare(kernel, p, true) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&n, function, &launch.config) != cudaSuccess) {
    cudaGetLastError();
    n = 0;
  }
  return known[key] = n;
}

}  // namespace

Choice choose(Problem& p, bool bf16, const Wish& wish) {
  const int id = current_device(), most_shared = attribute_of(id, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool has_clusters = attribute_of(id, cudaDevAttrClusterLaunch), cooperative = attribute_of(id, cudaDevAttrCooperativeLaunch);
  const auto clusters = [&](const Problem& p) { return has_clusters ? most_clusters(p, bf16, id) : 0; };
  const Device device{attribute_of(id, cudaDevAttrMultiProcessorCount), std::size_t(most_shared), cooperative, clusters};
  return Chooser(p, bf16, wish, device).choose();
}

std::string launch(const Problem& p, bool bf16, bool cluster, void* stream) {
  const Kernel kernel = kernel_of(p, bf16, cluster);
  const Launch launch(p, cluster, static_cast<cudaStream_t>(stream));
  cudaError_t error = prepare(kernel, p, cluster);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch.config, kernel, p);
  if (refused(error)) {
    cudaGetLastError();
    return asked(p, bf16, cluster) + ": " + text_of(error);
  }
  check(error, asked(p, bf16, cluster));
  return "";
}

}  // namespace hjepa_fast::cuda
