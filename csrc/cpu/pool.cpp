#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace hjepa_fast {

namespace {

// More than this is given back after the call.
constexpr std::size_t KEPT_BYTES = std::size_t(64) << 20;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void* allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

struct Barrier {
  int n_threads;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
  alignas(64) std::atomic<int> here{1};
  alignas(64) std::atomic<bool> called{false}, slow{false};
  std::atomic<i64> last_step{std::numeric_limits<i64>::max()};
  i64 step;
  int flip;
};

BarrierOwner::BarrierOwner(int n_threads) : barrier(new Barrier{n_threads}) {}
BarrierOwner::~BarrierOwner() { delete barrier; }

namespace {

// When another process has the core that a thread waited for needs, spinning only keeps it from running.
// Returns whether it took long.
template <class F>
bool spin_until(F ready) {
  constexpr int LONG = 2000;
  int spins = 0;
  for (; !ready(); ++spins)
    if (spins < LONG)
      relax();
    else
      sched_yield();
  return spins > LONG;
}

}  // namespace

void wait(Barrier& barrier) {
  if (barrier.n_threads == 1) return;
  const int round = barrier.round.load(std::memory_order_acquire);
  if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == barrier.n_threads) {
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.round.store(round + 1, std::memory_order_release);
    return;
  }
  if (spin_until([&] { return barrier.round.load(std::memory_order_acquire) != round; }))
    barrier.slow.store(true, std::memory_order_relaxed);
}

bool all_here(Barrier& barrier, bool patiently) {
  for (int spins = patiently ? 1000 : 0; spins >= 0; --spins) {
    if (barrier.here.load(std::memory_order_acquire) == barrier.n_threads) return true;
    if (spins) relax();
  }
  return false;
}

void call_in(Barrier& barrier, i64 step, int flip) {
  barrier.step = step;
  barrier.flip = flip;
  barrier.called.store(true, std::memory_order_release);
}

void join(Barrier& barrier, i64& step, int& flip) {
  barrier.here.fetch_add(1, std::memory_order_acq_rel);
  spin_until([&] { return barrier.called.load(std::memory_order_acquire); });
  step = barrier.step;
  flip = barrier.flip;
}

void dismiss_if_slow(Barrier& barrier, i64 step) {
  if (barrier.slow.load(std::memory_order_relaxed)) barrier.last_step.store(step, std::memory_order_relaxed);
}

bool dismissed(Barrier& barrier, i64 step) { return step >= barrier.last_step.load(std::memory_order_relaxed); }

struct Pool {
  const bool own_threads;
  std::mutex in_use;
  void* memory = nullptr;
  std::size_t bytes = 0;

  std::mutex mutex;
  std::condition_variable start, done;
  int n_workers = 0, wanted = 0, running = 0;
  unsigned long call = 0;
  void (*f)(void*, int) = nullptr;
  void* context = nullptr;

  void work(int thread, unsigned long seen) {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      start.wait(lock, [&] { return call != seen; });
      seen = call;
      if (thread >= wanted) continue;
      ++running;
      lock.unlock();
      f(context, thread);
      lock.lock();
      if (--running == 0) done.notify_one();
    }
  }

  // As many threads as can be had, up to n.
  int grow(int n) {
    try {
      const std::lock_guard<std::mutex> lock(mutex);
      for (; n_workers + 1 < n; ++n_workers) {
        std::thread worker([this, thread = n_workers + 1, seen = call] { work(thread, seen); });
        worker.detach();
      }
    } catch (const std::system_error&) {
    }
    return n < n_workers + 1 ? n : n_workers + 1;
  }
};

namespace {

// A thread sanitizer does not see how the threads of an OpenMP that was built without it wait for each other.
#if defined(__SANITIZE_THREAD__)
constexpr bool OWN_THREADS = true;
#else
constexpr bool OWN_THREADS = false;
#endif

// Never destroyed: workers may still wait when the process ends.
std::atomic<Pool*> the_pool{new Pool{OWN_THREADS}};

// A forked child has none of the threads, and perhaps a lock that nobody will release. Known from the moment the library
// is loaded, so that it holds for children of a process that has not used it yet.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool{true}; });

}  // namespace

namespace {

constexpr double SHORT_CALL = 2e9;  // some 20 ms of two cores
constexpr std::chrono::microseconds LONG_WAIT{1000};
constexpr int MOST_ALONE = 128;
std::atomic<int> calls_alone{0}, next_alone{1};

}  // namespace

Team::Team(int n_threads, double work) : short_(work < SHORT_CALL) {
  if (short_ && n_threads > 1 && calls_alone > 0 && calls_alone-- > 0) n_threads = 1;
  Pool& shared = *the_pool;
  if (!shared.in_use.try_lock()) return;
  pool_ = &shared;
  size_ = n_threads > 1 && shared.own_threads ? shared.grow(n_threads) : n_threads;
}

Team::~Team() {
  if (size_ > 1 && short_) {
    const int n_alone = next_alone;
    if (waited_) calls_alone = n_alone;
    next_alone = waited_ ? std::min(2 * n_alone, MOST_ALONE) : 1;
  }
  std::free(own_);
  if (!pool_) return;
  if (pool_->bytes > KEPT_BYTES) {
    std::free(pool_->memory);
    pool_->memory = nullptr;
    pool_->bytes = 0;
  }
  pool_->in_use.unlock();
}

void* Team::scratch(std::size_t bytes) {
  if (!pool_) {
    std::free(own_);
    own_ = nullptr;
    return own_ = allocate(bytes);
  }
  if (pool_->bytes < bytes) {
    std::free(pool_->memory);
    pool_->memory = nullptr;
    pool_->bytes = 0;
    pool_->memory = allocate(bytes);
    pool_->bytes = bytes;
  }
  return pool_->memory;
}

void Team::run(void (*f)(void*, int), void* context) {
  if (size_ == 1) return f(context, 0);
  if (!pool_->own_threads) {
    using Clock = std::chrono::steady_clock;
    const auto caller = std::this_thread::get_id();
    Clock::time_point finished = Clock::now();
    torch::stable::parallel_for(0, size_, 1, [&](i64 first, i64 last) {
      for (i64 i = first; i < last; ++i) f(context, int(i));
      if (std::this_thread::get_id() == caller) finished = Clock::now();
    });
    waited_ |= Clock::now() - finished > LONG_WAIT;
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(pool_->mutex);
    pool_->f = f;
    pool_->context = context;
    pool_->wanted = size_;
    ++pool_->call;
  }
  pool_->start.notify_all();
  f(context, 0);
  std::unique_lock<std::mutex> lock(pool_->mutex);
  pool_->wanted = 0;
  pool_->done.wait(lock, [&] { return pool_->running == 0; });
}

}  // namespace hjepa_fast
