// What the operators (ops.cpp, compiled without nvcc) call.
#pragma once

#include <string>

#include "problem.h"

namespace hjepa_fast::cuda {

// How a rollout is shared out on one device, for tests to choose; 0: by what the device has.
struct Wish {
  int variant;  // 0 any, 1 clusters, 2 a grid
  int team, rows;
};

enum class How { CLUSTERS, GRID, NOT };

struct Choice {
  How how;
  std::string why_not;
};

// Fills in how p is shared out on the current device; or tells why it cannot be.
Choice choose(Problem& p, bool bf16, const Wish& wish);

// Runs it on `stream`, a cudaStream_t, without waiting for it. Returns "", or why the device does not take such a launch:
// others share it, or it is none that this was compiled for. Throws std::runtime_error, with what was asked for, on any other
// failure.
std::string launch(const Problem& p, bool bf16, bool cluster, void* stream);

}  // namespace hjepa_fast::cuda
