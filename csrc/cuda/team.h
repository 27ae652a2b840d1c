// How blocks of a team send numbers to each other.
#pragma once

#include "device.h"

namespace hjepa_fast::cuda {

// `put` and `put_all` are for the buffer that is read after the next `meet`; of `parts` lanes that have the same number for
// all, each sends to some.

// A cluster: the buffers are in shared memory, and blocks write to that of others.
struct Cluster {
  static constexpr bool CLUSTER = true;
  float* buffers;
  int buffer_size, size, rank, index, count, flip = 0;

  HJEPA_DEVICE explicit Cluster(const Problem& p)
      : buffers(shared_memory() + p.buffer_at), buffer_size(p.buffer_size), size(p.team), rank(block() % p.team),
        index(block() / p.team), count(p.n_teams) {}

  HJEPA_DEVICE float* out() const { return buffers + flip * buffer_size; }
  HJEPA_DEVICE const float* in() const { return buffers + (1 - flip) * buffer_size; }

  // no block writes to another before that has started
  HJEPA_DEVICE void start() const { cluster_sync(); }
  template <class V>
  HJEPA_DEVICE void put(int owner, int at, V v) const { store_remote(out() + at, owner, v); }
  HJEPA_DEVICE void put_all(int at, float v, int part, int parts) const {
    for (int k = part; k < size; k += parts) store_remote(out() + at, k, v);
  }
  // zeros after the n numbers of each row of a layer: they meet the zeros of padded matrices
  HJEPA_DEVICE void pad(int rows, int n) const {
    const int ld = padded(n);
    for (int i = thread(); i < rows * (ld - n); i += n_threads()) out()[i / (ld - n) * ld + n + i % (ld - n)] = 0.0f;
  }
  HJEPA_DEVICE void meet() {
    cluster_sync();
    flip = 1 - flip;
  }
  // the layer [rows, padded(n)] that all have put, in shared memory
  HJEPA_DEVICE const float* gathered(int, int) const { return in(); }
  HJEPA_DEVICE float received(int at) const { return in()[at]; }
};

// A grid whose blocks all run at the same time: the buffers are in the L2 cache. At the barrier a block raises its own flag
// and waits for those of its team, which costs one store and one load's way through the L2 cache and no atomic operation.
struct Grid {
  static constexpr bool CLUSTER = false;
  float *buffers, *local;
  unsigned *flags, met = 0;
  int buffer_size, size, rank, index, count, flip = 0;

  HJEPA_DEVICE explicit Grid(const Problem& p)
      : local(shared_memory() + p.buffer_at), buffer_size(p.buffer_size), size(p.team), rank(block() % p.team),
        index(block() / p.team), count(p.n_teams) {
    buffers = p.exchange + i64(index) * 2 * (size + 1) * buffer_size;
    flags = p.flags + index * size;
  }

  HJEPA_DEVICE float* buffer(int flip, int owner) const { return buffers + i64(flip * (size + 1) + owner) * buffer_size; }

  HJEPA_DEVICE void start() const { sync(); }
  template <class V>
  HJEPA_DEVICE void put(int owner, int at, V v) const {
    store_shared_out(reinterpret_cast<V*>(buffer(flip, owner) + at), v);
  }
  HJEPA_DEVICE void put_all(int at, float v, int part, int) const {
    if (part == 0) store_shared_out(buffer(flip, size) + at, v);
  }
  HJEPA_DEVICE void pad(int, int) const {}
  HJEPA_DEVICE void meet() {
    ++met;
    sync();
    if (thread() == 0) publish(flags + rank, met);
    if (thread() < size) await(flags + thread(), met);
    sync();
    flip = 1 - flip;
  }
  HJEPA_DEVICE const float* gathered(int rows, int n) const {
    const int ld = padded(n);
    const float4* from = reinterpret_cast<const float4*>(buffer(1 - flip, size));
    for (int i = thread(); i < rows * ld / 4; i += n_threads()) {
      float4 x = load_shared_out(from + i);
      const int real = n - 4 * i % ld;
      if (real < 1) x.x = 0.0f;
      if (real < 2) x.y = 0.0f;
      if (real < 3) x.z = 0.0f;
      if (real < 4) x.w = 0.0f;
      reinterpret_cast<float4*>(local)[i] = x;
    }
    sync();
    return local;
  }
  HJEPA_DEVICE float received(int at) const { return load_shared_out(buffer(1 - flip, rank) + at); }
};

}  // namespace hjepa_fast::cuda
