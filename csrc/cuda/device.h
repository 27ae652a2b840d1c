// The few things that the kernel takes from the machine, so that the same source runs on the CPU too (see emulate.h).
#pragma once

#include "problem.h"

#ifdef __CUDACC__

#define HJEPA_DEVICE __device__ __forceinline__
#define HJEPA_FUNCTION __device__ __noinline__

namespace hjepa_fast::cuda {

HJEPA_DEVICE int thread() { return threadIdx.x; }
HJEPA_DEVICE int n_threads() { return blockDim.x; }
HJEPA_DEVICE int block() { return blockIdx.x; }
HJEPA_DEVICE void sync() { __syncthreads(); }
HJEPA_DEVICE float shuffle_xor(float v, int lane_bit) { return __shfl_xor_sync(~0u, v, lane_bit); }
HJEPA_DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }

// At an address that is a multiple of V's size, which one instruction reads.
template <class V>
HJEPA_DEVICE V load_as(const void* at) {
  return *static_cast<const V*>(at);
}

HJEPA_DEVICE float* shared_memory() {
  extern __shared__ float4 memory[];
  return reinterpret_cast<float*>(memory);
}

// Every thread of every block of the cluster comes here; what was written before, also to other blocks, can be read after.
HJEPA_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// `at` in this block's shared memory, as the cluster's block `rank` has it
HJEPA_DEVICE unsigned remote(const float* at, int rank) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(at));
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
  return address;
}
HJEPA_DEVICE void store_remote(float* at, int rank, float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote(at, rank)), "f"(v) : "memory");
#endif
}
HJEPA_DEVICE void store_remote(float* at, int rank, float2 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote(at, rank)), "f"(v.x), "f"(v.y) : "memory");
#endif
}

// Global memory that other blocks write during the launch: in the L2 cache, past that of the multiprocessor.
HJEPA_DEVICE float load_shared_out(const float* at) { return __ldcg(at); }
HJEPA_DEVICE float4 load_shared_out(const float4* at) { return __ldcg(at); }
template <class V>
HJEPA_DEVICE void store_shared_out(V* at, V v) { __stcg(at, v); }

// `to` in shared memory; there when this thread's `copies_done` returns, and for others after the next barrier.
HJEPA_DEVICE void copy_async(float* to, const float* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#else
  *to = *from;
#endif
}
HJEPA_DEVICE void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

HJEPA_DEVICE void publish(unsigned* flag, unsigned value) {
  __threadfence();
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
HJEPA_DEVICE void await(const unsigned* flag, unsigned value) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (!reached(seen, value));
}

}  // namespace hjepa_fast::cuda

#else
#include "emulate.h"
#endif
