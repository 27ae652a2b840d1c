// Threads that go through a tile of rows together.
#pragma once

namespace hjepa_fast::HJEPA_ISA {

// Each thread has a share of the columns of everything; what only a whole row tells, such as a norm, one of them finds out
// for a share of the rows. No number depends on how many there are.
//
// The first thread starts alone. The others come in at the start of a step, once they are all there; when a meeting took so
// long that another process must want the cores, the first goes on alone after that step.
struct Crew {
  Barrier* barrier;
  const int thread, all;
  int n = 1;  // who are at work

  Crew(Barrier* barrier, int thread, int all) : barrier(barrier), thread(thread), all(all) {}

  HJEPA_INLINE void meet() const {
    if (n > 1) wait(*barrier);
  }

  HJEPA_INLINE i64 first(i64 items) const { return items * thread / n; }
  HJEPA_INLINE i64 last(i64 items) const { return items * (thread + 1) / n; }

  // This thread's columns of rows of n numbers: whole panels, the last one padded.
  template <class T>
  HJEPA_INLINE void columns(i64 n_columns, i64& from, i64& to) const {
    const i64 panels = n_panels<T>(n_columns);
    from = first(panels) * NR<T>;
    to = last(panels) * NR<T>;
  }

  // f(column) for each vector of these.
  template <class T, class F>
  HJEPA_INLINE void over_columns(i64 n_columns, F f) const {
    i64 from, to;
    columns<T>(n_columns, from, to);
    for (i64 c = from; c < to; c += LANES<T>) f(c);
  }

  // f(row, column) for each vector of these.
  template <class T, class F>
  HJEPA_INLINE void over_own(i64 rows, i64 n_columns, F f) const {
    i64 from, to;
    columns<T>(n_columns, from, to);
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = from; c < to; c += LANES<T>) f(r, c);
  }

  // f(row, column) for each panel of these.
  template <class T, class F>
  HJEPA_INLINE void over_panels(i64 rows, i64 n_columns, F f) const {
    i64 from, to;
    columns<T>(n_columns, from, to);
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = from; c < to; c += NR<T>) f(r, c);
  }

  // The step at which this thread starts, and what the first one has counted up to then; that one prepares what they share.
  i64 start(int& counted) {
    counted = 0;
    if (thread == 0) return 0;
    i64 step;
    join(*barrier, step, counted);
    n = all;
    return step;
  }

  // The first thread before a step; whether the others come in now, after which it must `let_in`.
  bool may_let_in(i64 step) const { return thread == 0 && n < all && !alone && all_here(*barrier, step == 0); }
  void let_in(i64 step, int counted) {
    n = all;
    call_in(*barrier, step, counted);
  }

  // After a step; whether this thread is done.
  bool leaves(i64 step) {
    if (n == 1) return false;
    if (thread == 0) dismiss_if_slow(*barrier, step);
    meet();
    if (!dismissed(*barrier, step)) return false;
    alone = true;
    n = 1;
    return thread != 0;
  }

  // After the last one; those who never came in are sent away.
  void end(i64 steps) {
    if (thread == 0 && n < all && !alone) call_in(*barrier, steps, 0);
  }

 private:
  bool alone = false;
};

}  // namespace hjepa_fast::HJEPA_ISA
