// How a rollout is shared out on a device.
#pragma once

#include <functional>
#include <string>

#include "kernels.h"

namespace hjepa_fast::cuda {

struct Device {
  int multiprocessors;
  std::size_t most_shared;  // bytes of a block
  bool cooperative;         // whether it can start a grid whose blocks all run at the same time
  // how many clusters like the problem's it runs at the same time; 0 where it knows no such cluster
  std::function<int(const Problem&)> clusters;
};

class Chooser {
 public:
  Chooser(Problem& p, bool bf16, const Wish& wish, const Device& device)
      : p(p), element(bf16 ? 2 : 4), wish(wish), device(device), widest(*std::max_element(p.width, p.width + p.L)) {}

  // Clusters that hold every matrix are taken where there are any: their barrier should be the faster one (not measured).
  Choice choose() {
    if (wish.variant != 2 && clusters() && (wish.variant == 1 || in_shared() == p.L)) return {How::CLUSTERS, ""};
    if (wish.variant != 1 && grid()) return {How::GRID, ""};
    return {How::NOT, "it has no room for " + std::to_string(p.B) + " samples of widths up to " + std::to_string(widest) + ": " +
                          std::to_string(device.most_shared) + " bytes of shared memory a block, " +
                          (device.cooperative ? "cooperative launches" : "no cooperative launches")};
  }

  i64 in_shared() const {
    return std::count_if(p.matrix_at, p.matrix_at + p.L, [](int at) { return at >= 0; });
  }

 private:
  // 1, 4 or 8 samples are taken together: with 2 a team would be done hardly earlier than with 4.
  static int more(int rows) { return rows == 1 ? 4 : 2 * rows; }
  static int fewer(int rows) { return rows == 8 ? 4 : rows / 4; }
  static int ratio(int a, int b) { return (a + b - 1) / b; }

  // As many, of `most` that run at once, as finish together: each takes its turns with the matrices that it has loaded.
  int teams(int rows, int most) const {
    const int groups = ratio(p.B, rows);
    return ratio(groups, ratio(groups, most));
  }

  bool lay_out(int rows, int team, int n_teams, bool cluster) {
    return cuda::lay_out(p, rows, team, n_teams, MAX_THREADS, cluster, element, device.most_shared);
  }

  bool clusters() {
    // an estimate, not measured: with fewer features to a block the barrier would take longer than what is shared out
    constexpr int FEATURES = 16;
    int largest = 16;
    while (largest > 1 && largest / 2 >= ratio(widest, FEATURES)) largest /= 2;
    for (int team = wish.team ? wish.team : largest; team; team = wish.team ? 0 : team / 2) {
      int rows = 0, n = 0;
      // the fewest samples with which all clusters run at once, or as many as there is room for
      for (int r = wish.rows ? wish.rows : 1; r <= (wish.rows ? wish.rows : MOST_ROWS); r = more(r)) {
        if (!lay_out(r, team, ratio(p.B, r), true)) break;
        const int at_once = device.clusters(p);
        if (at_once) rows = r, n = at_once;
        if (at_once >= p.n_teams) break;
      }
      if (rows) return lay_out(rows, team, teams(rows, n), true);
    }
    return false;
  }

  bool grid() {
    constexpr int FEATURES = 4, FEWEST_BLOCKS = 16;
    if (!device.cooperative) return false;
    const int most_teams = std::max(1, device.multiprocessors / (wish.team ? wish.team : FEWEST_BLOCKS));
    int rows = wish.rows ? wish.rows : 1;
    while (!wish.rows && rows < MOST_ROWS && ratio(p.B, rows) > most_teams) rows = more(rows);
    for (; rows; rows = wish.rows ? 0 : fewer(rows)) {
      const int n_teams = teams(rows, most_teams);
      const int most_blocks = std::min(MAX_THREADS, ratio(widest, FEATURES));  // a thread looks after one block's flag
      const int team = wish.team ? wish.team : std::min(device.multiprocessors / n_teams, most_blocks);
      if (lay_out(rows, team, n_teams, false)) return true;
    }
    return false;
  }

  Problem& p;
  const std::size_t element;
  const Wish& wish;
  const Device& device;
  const int widest;
};

}  // namespace hjepa_fast::cuda
