// What one call computes, as plain pointers: shared by the operators, which fill it in, and by the kernels of every
// instruction set. No inline functions here, so that no code compiled for one instruction set can be linked into another.
#pragma once

#include <cstdint>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace hjepa_fast {

using i64 = std::int64_t;

// A call's memory is one block, in which an address sanitizer sees no pieces: there each is followed by some bytes, of which it
// reports any use until the block is laid out anew.
#if defined(__SANITIZE_ADDRESS__)
constexpr i64 FORBIDDEN = 64;
#define HJEPA_FORBID(from) __asan_poison_memory_region(from, FORBIDDEN)
#define HJEPA_ALLOW(from, bytes) __asan_unpoison_memory_region(from, bytes)
#else
constexpr i64 FORBIDDEN = 0;
#define HJEPA_FORBID(from) (void)0
#define HJEPA_ALLOW(from, bytes) (void)0
#endif

constexpr int MAX_LAYERS = 32;
// Rows of a weight matrix are divided into this many blocks, whatever the number of threads, so that sums over blocks do
// not depend on it.
constexpr int N_BLOCKS = 8;

enum class Kind : int { softplus, tanh, silu, gelu, gelu_tanh, sin, sigmoid, elu, quadratic };

struct Activation {
  Kind kind;
  double beta, threshold;
};

// Where threads that share the features meet. The first starts alone and calls the others in once they are all there:
// on a busy machine a thread may take longer to wake up than the whole rollout takes.
struct Barrier;
void wait(Barrier&);
bool all_here(Barrier&, bool patiently);
void call_in(Barrier&, i64 step, int flip);
void join(Barrier&, i64& step, int& flip);
// The first thread, before the last wait of a step: sends the others away after this step if some wait took so long that
// another process must have taken a core. Everyone, after that wait: whether this was the last step together.
void dismiss_if_slow(Barrier&, i64 step);
bool dismissed(Barrier&, i64 step);

// The right operand M of products x M: in column panels if `packed`, else as it lies, [inner, columns] or, transposed, [columns,
// inner], for few rows or few uses.
template <class T>
struct Right {
  const T *packed, *raw;
  i64 ld;  // of raw rows; of packed panels the units along the inner dimension from one to the next, which may be more than its own
  bool transposed;
};

// A network F after its first layer. Layers l = 1..L in the mathematics are indices 0..L-1 here; W[l] is W_{l+2}, from layer
// index l to l+1.
template <class T>
struct Net {
  int L;
  i64 width[MAX_LAYERS];  // h_1, ..., h_L
  Activation activation[MAX_LAYERS];
  const T* W[MAX_LAYERS];  // [width[l+1], width[l]], for the last l the output weights w [1, h_L], padded
  i64 ldW[MAX_LAYERS];
  const T* b[MAX_LAYERS];                        // padded with zeros; the last is that of H
  Right<T> by_WT[MAX_LAYERS], by_W[MAX_LAYERS];  // x W^T, x W
  i64 tape_width;                                // numbers of an evaluation and sample: 0, h_1, or all a_l and g_l
  bool tape_layers;
};

// A rollout of one network of q and p, with K = Wp Wq^T.
template <class T>
struct Problem : Net<T> {
  const T* K;
  i64 ldK;
  Right<T> by_KT, by_K;

  i64 B, n_steps, begin, end;  // steps begin..end-1 of n_steps are run
  int n_sub;
  const double* scheme;  // [n_sub, 4]: kick, drift, implicit kick, implicit drift
  bool implicit;         // whether any of the last two is not zero
  double tolerance;
  i64 max_evaluations;
  const T* dt;  // [1 or B, n_steps]
  i64 dt_stride;
  i64 n_kept;  // states in sq, sp (or their cotangents): n_steps, or 1 for the last alone

  // forward: a in and out; sq, sp [B, n_kept, h]; energy [B, n_steps] or null
  T *a, *sq, *sp, *energy, *tape;
  // of implicit sub-steps, [B, n_steps]; backward: the largest residual of each row, [B], in and out
  T* residual;
  std::int32_t* evaluations;
  // backward: la, lsq, lsp in and out; gE may be null
  T *la, *lsq, *lsp, *gdt;
  const T *gsq, *gsp, *gE;
};

// Where a task adds its parameter gradients; null pointers if they are not wanted. Leading dimension ld(width).
template <class T>
struct Sums {
  T* K;
  T* W[MAX_LAYERS];
  T* b[MAX_LAYERS];
};

constexpr int MAX_NETWORKS = 8, MAX_REGISTERS = 64, MAX_MATRICES = 32, MAX_ITEMS = 24;

// A line of a program, as in hjepa_fast/hidden_space/program.py.
enum Op : int { EVALUATE, ADD, CLEAR, KEEP, RESTORE, LOAD, ADJOINT, FORGET, HESSIAN, TAKE, SCALE, GIVE, UNSCALE };

struct Line {
  int op, x, y;
  double c;
  bool scaled;
  int matrix;
  bool transposed;
  int item, slot, energy;
  bool meet;
};

struct Code {
  const Line* at;
  int n;
};

// What the tape holds: an evaluation of a network, or a register's value; slots in the first step, each later one, after the last.
struct Item {
  int reg;
  bool network;
  i64 first, later, end, width, offset;

  i64 before(i64 step) const { return step == 0 ? 0 : first + (step - 1) * later; }
};

// y <- y + c x M: M [n, m], or a diagonal.
template <class T>
struct Matrix {
  i64 n, m;
  const T* diagonal;  // padded, or null
  Right<T> straight, transposed;
};

// Where a register's rows come from at the start: columns of z0; a network's first layer at columns of z0; zeros; a unit vector.
struct Origin {
  enum { ZERO, COLUMNS, LAYER, UNIT, GIVEN } kind;
  i64 from;  // the first column of z0, or which unit vector
  int network;
};

// Rows of numbers a sample, of any stride from one to the next (and from one step to the next); or null.
template <class T>
struct Rows {
  T* at;
  i64 stride, step;
};

template <class T>
struct Program {
  int n_registers, n_networks, n_items, n_matrices, n_state, n_known, n_path;
  i64 width[MAX_REGISTERS];
  int state[MAX_REGISTERS], known[MAX_NETWORKS], path[MAX_REGISTERS];
  bool tracked[MAX_REGISTERS];
  int reg_a[MAX_NETWORKS], reg_d[MAX_NETWORKS];
  Net<T> network[MAX_NETWORKS];
  Item item[MAX_ITEMS];
  Matrix<T> matrix[MAX_MATRICES];
  Code start, first, later, last, back_last, back_later, back_first;
  i64 B, n_steps, begin, end;  // steps begin..end-1 of n_steps are run
  bool every;                  // whether the path is wanted after every step
  const T* dt;                 // [1 or B, n_steps]
  i64 dt_stride;
  T* tape;  // [B, tape_width], or null
  i64 tape_width;

  // of `state` before step `begin`, or null where it comes from z0
  Rows<const T> in[MAX_REGISTERS];
  Origin origin[MAX_REGISTERS];
  Rows<const T> z0;
  Right<T> first_WT[MAX_NETWORKS];
  const T* first_b[MAX_NETWORKS];  // padded
  i64 inner[MAX_NETWORKS];         // numbers that a first layer reads
  bool emit_start;                 // whether the path starts with step 0
  Rows<T> out[MAX_REGISTERS], emit[MAX_REGISTERS];
  T* energy;  // [B, n_steps + 1], added to; or null
  // backward: cotangents of `state` and `known`, values of `state`, in and out; cotangents of the path; [B, n_steps + 1] or null
  Rows<T> cotangent[MAX_REGISTERS], value[MAX_REGISTERS];
  Rows<const T> g_path[MAX_REGISTERS];
  const T* gE;
  T* gdt;                             // [B, n_steps]
  Rows<const T> external[MAX_ITEMS];  // numbers of every step, rows or steps 0 apart where they are the same
  Rows<T> of_external[MAX_ITEMS];     // backward: [B, n_steps, width], added to
  bool again;                         // whether each tile runs forward first, on a tape of its own

  const Code& code(i64 step) const { return step ? later : first; }
  const Code& back_code(i64 step) const { return step ? back_later : back_first; }
};

// Where a task adds its gradients: of each matrix [n, ld(m)], or diagonal; of each network.
template <class T>
struct ProgramSums {
  T* matrix[MAX_MATRICES];
  Sums<T> network[MAX_NETWORKS];
};

// grad F of a whole network at rows x [B, n], F = what follows a = x W^T + b.
template <class T>
struct Gradient {
  static constexpr i64 NARROW = 32;  // columns of W, below which its gradient is summed transposed: panels are that wide
  Net<T> net;
  i64 B, n;
  T* tape;  // [B, net.tape_width]
  Right<T> by_WT, by_W;
  const T* b;  // padded
  const T* x;
  T *gradient, *value;            // forward: [B, n], [B]
  const T *g_gradient, *g_value;  // backward: their cotangents, or null
  T* g_x;                         // [B, n]
  // Factors of the weights' gradients, if these are to be multiplied by the caller: W's is delta^T g_gradient + nu^T x, that of the next ones left^T right
  // with (e_{l+1}; r_{l+1}) on the left and (zd_l; z_l) on the right, [2 B, width] each.
  T *delta, *nu, *left[MAX_LAYERS], *right[MAX_LAYERS];
};

template <class T>
struct GradientSums {
  T* b;  // [h]
  T* W;  // [h, ld(n)], or [n, ld(h)] where n is small; null if the factors of every weight's gradient are wanted instead
  Sums<T> tail;  // of these the biases and the output weights; the others too if W is wanted
};

// All layers of a network with any number of outputs: layer l takes width[l] numbers to width[l + 1].
template <class T>
struct Dense {
  int L;  // 0 where there is no network
  i64 width[MAX_LAYERS + 1];
  Activation activation[MAX_LAYERS];
  Right<T> by_WT[MAX_LAYERS], by_W[MAX_LAYERS];
  const T* b[MAX_LAYERS];  // padded
};

constexpr int MAX_COORDINATES = 32;
enum class Mass : int { identity, diagonal, cholesky };

// H(q, p) = p^T M^-1(q) p / 2 + V(q) as in hjepa_fast/state_space/system.py, and what is computed of it.
template <class T>
struct Mechanical {
  int d, n_others, n_angles;
  int others[MAX_COORDINATES], angles[MAX_COORDINATES];
  i64 n, m;                    // features; entries that the mass is made of
  i64 below[MAX_COORDINATES];  // where row i of a Cholesky factor below the diagonal starts in these
  Mass mass;
  bool softplus;
  T epsilon;
  Dense<T> V, N;
  const T* entries;  // of a constant mass, or null

  i64 B, n_steps, begin, end;  // steps begin..end-1 of n_steps are run
  int n_sub;
  const double *scheme, *mix;  // [n_sub, 4]: kick, drift, implicit kick, implicit drift; [n_sub, n_sub]
  bool implicit, mixes;
  double tolerance;
  i64 max_evaluations;
  const T* dt;  // [1 or B, n_steps]
  i64 dt_stride;
  T* states;  // [B, n_steps + 1, 2d], of which `begin` is there
  // [B, n_steps, n_sub, tape_width], or null: a point and f there; if `tape_layers` what restores the rest, see `Saved` in
  // hjepa_fast/state_space/equations.py
  T* tape;
  i64 tape_width;
  bool tape_layers;
  T* residual;  // [B, n_steps]; backward: [B], in and out
  std::int32_t* evaluations;
  // backward: [B, 2d], in and out; [B, n_steps, 2d] or null
  T *later, *gdt;
  const T* g_states;

  // the gradient alone, at z [B, 2d]; its adjoint, from cotangents [B, 2d] and [B], or null
  const T *z, *v, *e;
  T *gradient, *g_z;
};

// Where a task adds its gradients: of each layer [width[l + 1], ld(width[l])], of the first transposed; of the entries.
template <class T>
struct MechanicalSums {
  Sums<T> V, N;
  T* entries;
};

// The right operand of a product, [inner, columns]: rows in panels of two vectors' columns.
template <class T>
struct Operand {
  const T* at;
  i64 row_stride, panel_stride;
};

// Where a product goes: row r to `to` + (r / group) group_stride + (r % group) row_stride, added to row r / group of `base`
// if that is not null.
template <class T>
struct Target {
  T* to;
  i64 group, group_stride, row_stride;
  const T* base;
  i64 base_stride;
};

// The kernels of one instruction set. Sizes are in numbers of type T.
template <class T>
struct Kernels {
  i64 lanes;      // of a vector
  i64 tile_rows;  // rows that go through the loop together
  i64 depth;      // numbers along the inner dimension in a unit of a packed operand
  i64 (*ld)(i64 n);
  i64 (*packed_size)(i64 inner, i64 columns);
  i64 (*n_panels)(i64 columns);
  // panels first..last-1 of the operand B [inner, columns] = W [columns, inner]^T if transposed, else W [inner, columns]
  void (*pack)(const T* W, i64 ldW, bool transposed, i64 inner, i64 columns, T* packed, i64 first, i64 last);
  // rows first..first+rows-1 of X [*, inner] B, columns `column` (a panel's first) to last-1
  void (*multiply)(const T* X, i64 first, i64 rows, i64 inner, const Operand<T>& B, i64 column, i64 last, const Target<T>&);
  // A crew of threads calls the next with the same tile and scratch; one alone needs no barrier.
  i64 (*forward_scratch)(const Problem<T>&, i64 rows, int crew_size);
  void (*forward)(const Problem<T>&, i64 row, i64 rows, int thread, int crew_size, Barrier*, T* scratch);
  i64 (*backward_scratch)(const Problem<T>&, i64 rows, bool with_sums, int crew_size);
  // rows row..last-1, in tiles of at most `rows`
  void (*backward)(const Problem<T>&, i64 row, i64 last, i64 rows, int thread, int crew_size, Barrier*, T* scratch,
                   const Sums<T>*);
  i64 (*shared_scratch)(const Problem<T>&);
  i64 (*thread_scratch)(const Problem<T>&);
  void (*forward_features)(const Problem<T>&, int thread, int n_threads, Barrier&, T* shared, T* scratch);
  i64 (*program_forward_scratch)(const Program<T>&, i64 rows, int crew_size);
  void (*program_forward)(const Program<T>&, i64 row, i64 rows, int thread, int crew_size, Barrier*, T* scratch);
  i64 (*program_backward_scratch)(const Program<T>&, i64 rows, bool with_sums, int crew_size);
  void (*program_backward)(const Program<T>&, i64 row, i64 last, i64 rows, int thread, int crew_size, Barrier*, T* scratch,
                           const ProgramSums<T>*);
  i64 (*gradient_scratch)(const Gradient<T>&, i64 rows);
  void (*gradient)(const Gradient<T>&, i64 row, i64 rows, T* scratch);
  i64 (*gradient_backward_scratch)(const Gradient<T>&, i64 rows, bool with_sums);
  void (*gradient_backward)(const Gradient<T>&, i64 row, i64 last, i64 rows, T* scratch, const GradientSums<T>*);
  i64 (*states_scratch)(const Mechanical<T>&, i64 rows, bool backward);
  // rows row..last-1, in tiles of at most `rows`
  void (*states_forward)(const Mechanical<T>&, i64 row, i64 last, i64 rows, T* scratch);
  void (*states_backward)(const Mechanical<T>&, i64 row, i64 last, i64 rows, T* scratch, const MechanicalSums<T>*);
  void (*states_gradient)(const Mechanical<T>&, i64 row, i64 last, i64 rows, T* scratch);
  void (*states_gradient_backward)(const Mechanical<T>&, i64 row, i64 last, i64 rows, T* scratch, const MechanicalSums<T>*);
};

}  // namespace hjepa_fast
