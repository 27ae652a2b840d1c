// A GPU on the CPU, for tests: every thread of every block is a fiber, all in one thread of the machine, that runs until it
// waits for others. What the kernel takes from the machine (device.h) is done in a few lines each; in which order the fibers
// take their turns is the test's choice, so that a barrier that is missing shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define HJEPA_DEVICE inline
#define HJEPA_FUNCTION inline

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};

namespace hjepa_fast::cuda {

namespace emulated {

struct Barrier {
  int n, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  float sent[2][32];
};

struct Block {
  std::vector<float4> memory;
  Barrier barrier;
  std::vector<Warp> warps;
  int started = 0, done = 0;  // threads
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int thread, block;
  const unsigned* awaited;  // it goes on when this has come to `value`
  unsigned value;
  bool started, done;
  std::vector<std::pair<float*, const float*>> copies;
};

struct Machine {
  int n_threads, cluster;
  std::vector<Block> blocks;
  std::vector<Barrier> clusters;
  std::vector<Fiber> fibers;
  Fiber* now;
  bool misaligned, absent;
  ucontext_t scheduler;
  std::function<void()> kernel;
};
inline Machine machine;

inline Block& this_block() { return machine.blocks[machine.now->block]; }

inline void wait_until(const unsigned* word, unsigned value) {
  Fiber& fiber = *machine.now;
  if (reached(*word, value)) return;
  fiber.awaited = word;
  fiber.value = value;
  swapcontext(&fiber.context, &machine.scheduler);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.n) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    wait_until(&barrier.generation, barrier.generation + 1);
  }
}

inline void run_fiber() {
  machine.kernel();
  machine.now->done = true;
  swapcontext(&machine.now->context, &machine.scheduler);
}

// Runs `kernel` in n_blocks of n_threads, `cluster` blocks with barriers and memory in common. `order`: 0 the first threads
// first, 1 the last, more: as it falls out.
inline void run(int n_blocks, int n_threads, int cluster, std::size_t shared_floats, unsigned order,
                std::function<void()> kernel) {
  constexpr std::size_t STACK = 1 << 16;
  machine.n_threads = n_threads;
  machine.cluster = cluster;
  machine.misaligned = machine.absent = false;
  machine.kernel = std::move(kernel);
  machine.clusters.assign(n_blocks / cluster, {cluster * n_threads});
  const float nan = std::nanf("");
  machine.blocks.assign(n_blocks, {{shared_floats / 4 + 1, {nan, nan, nan, nan}}, {n_threads}, {}});
  machine.fibers.clear();
  machine.fibers.resize(std::size_t(n_blocks) * n_threads);
  std::size_t n = 0;
  for (int b = 0; b < n_blocks; ++b) {
    machine.blocks[b].warps.assign(n_threads / 32, Warp{{32}, {}});
    for (int t = 0; t < n_threads; ++t) {
      Fiber& fiber = machine.fibers[n++];
      fiber.stack.reset(new char[STACK]);
      fiber.thread = t, fiber.block = b, fiber.awaited = nullptr, fiber.started = fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = STACK;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
  }
  std::vector<std::size_t> turns(n);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  if (order > 1) std::shuffle(turns.begin(), turns.end(), std::mt19937(order));
  for (std::size_t done = 0; done < n;) {
    bool moved = false;
    for (const std::size_t i : turns) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.done || (fiber.awaited && !reached(*fiber.awaited, fiber.value))) continue;
      fiber.awaited = nullptr;
      machine.now = &fiber;
      this_block().started += !fiber.started;
      fiber.started = true;
      swapcontext(&machine.scheduler, &fiber.context);
      moved = true;
      done += fiber.done;
      this_block().done += fiber.done;
    }
    if (!moved) throw std::runtime_error("every thread waits for another");
  }
  if (machine.misaligned) throw std::runtime_error("an address is not a multiple of what is read or written there");
  if (machine.absent) throw std::runtime_error("a block wrote to one that had not started, or that had ended");
}

}  // namespace emulated

inline int thread() { return emulated::machine.now->thread; }
inline int n_threads() { return emulated::machine.n_threads; }
inline int block() { return emulated::machine.now->block; }
inline void sync() { emulated::wait(emulated::this_block().barrier); }

inline float shuffle_xor(float v, int lane_bit) {
  emulated::Warp& warp = emulated::this_block().warps[thread() / 32];
  float* const sent = warp.sent[warp.barrier.generation % 2];
  sent[thread() % 32] = v;
  emulated::wait(warp.barrier);
  return sent[(thread() % 32) ^ lane_bit];
}

inline float as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// a GPU refuses any other address
template <class V>
void check_aligned(const V* at) {
  if (reinterpret_cast<std::uintptr_t>(at) % sizeof(V)) emulated::machine.misaligned = true;
}

template <class V>
V load_as(const void* at) {
  check_aligned(static_cast<const V*>(at));
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

inline float* shared_memory() { return reinterpret_cast<float*>(emulated::this_block().memory.data()); }

inline void cluster_sync() { emulated::wait(emulated::machine.clusters[block() / emulated::machine.cluster]); }

template <class V>
void store_remote(float* at, int rank, V v) {
  const int other = block() / emulated::machine.cluster * emulated::machine.cluster + rank;
  emulated::Block& theirs = emulated::machine.blocks[other];
  if (theirs.started < n_threads() || theirs.done == n_threads()) emulated::machine.absent = true;
  float* const memory = reinterpret_cast<float*>(theirs.memory.data());
  check_aligned(reinterpret_cast<V*>(at));
  std::memcpy(memory + (at - shared_memory()), &v, sizeof v);
}

template <class V>
V load_shared_out(const V* at) {
  return load_as<V>(at);
}
template <class V>
void store_shared_out(V* at, V v) {
  check_aligned(at);
  std::memcpy(at, &v, sizeof v);
}

// what is copied is there at the latest possible moment
inline void copy_async(float* to, const float* from) { emulated::machine.now->copies.emplace_back(to, from); }
inline void copies_done() {
  for (const auto& [to, from] : emulated::machine.now->copies) *to = *from;
  emulated::machine.now->copies.clear();
}

inline void publish(unsigned* flag, unsigned value) { *flag = value; }
inline void await(const unsigned* flag, unsigned value) { emulated::wait_until(flag, value); }

}  // namespace hjepa_fast::cuda
