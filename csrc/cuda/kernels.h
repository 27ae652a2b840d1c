// What the operators (ops.cpp, compiled without nvcc) call.
#pragma once

#include "problem.h"

namespace hjepa_fast::cuda {

// How a rollout is shared out on one device, for tests to choose; 0: by what the device has.
struct Wish {
  int variant;  // 0 any, 1 clusters, 2 a grid
  int team, rows;
};

// Fills in how p is shared out on the current device, and whether that is in clusters.
// Throws std::runtime_error, with what was asked for, if it cannot be.
bool choose(Problem& p, bool bf16, const Wish& wish);

// Runs it on `stream`, a cudaStream_t, without waiting for it. Throws as `choose`.
void launch(const Problem& p, bool bf16, bool cluster, void* stream);

}  // namespace hjepa_fast::cuda
