// Threads that wait for work, and the barrier they meet at.
#pragma once

#include <cstddef>

#include "problem.h"

namespace hjepa_fast {

// The process's threads, for as long as this object lives. If another thread of the caller's is using them, there is
// one thread: the caller's own, which then does every task in turn.
//
// These are PyTorch's threads: after an operation of PyTorch they keep spinning for milliseconds, and any others would
// compete with them for the cores. In a forked child, where PyTorch's may wait for ever, they are this library's own.
//
// PyTorch returns only when all its threads have been there, even to find nothing left. Where other processes want the cores
// that takes as long as the system lets those run, often longer than a short call. After such a call the next short ones go
// without the others, more of them each time that it happens again.
class Team {
 public:
  // work: of the whole call, in multiplications
  Team(int n_threads, double work);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }
  // Somebody had to wait for a core.
  void note_wait() { waited_ = true; }
  // Memory, aligned to a cache line, kept from call to call where it is the process's own.
  void* scratch(std::size_t bytes);
  // f(context, thread) on the caller's thread, and on the others as far as they wake up before that is done: whoever comes
  // first must take the work that is left. f must not throw.
  void run(void (*f)(void*, int), void* context);

  template <class F>
  void run(const F& f) {
    run([](void* context, int thread) { (*static_cast<const F*>(context))(thread); }, const_cast<F*>(&f));
  }

 private:
  int size_ = 1;
  bool short_ = false, waited_ = false;
  struct Pool* pool_ = nullptr;
  void* own_ = nullptr;
};

struct BarrierOwner {
  explicit BarrierOwner(int n_threads);
  ~BarrierOwner();
  BarrierOwner(const BarrierOwner&) = delete;
  BarrierOwner& operator=(const BarrierOwner&) = delete;
  Barrier* barrier;
};

}  // namespace hjepa_fast
