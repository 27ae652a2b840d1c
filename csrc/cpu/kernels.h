// The kernels of one instruction set, in a namespace of its own: a kernels_*.cpp sets HJEPA_ISA, HJEPA_VECTOR_BYTES and
// the compiler's target, and includes this. No standard headers with inline functions: the linker keeps one copy of
// those, which must not be one that needs this instruction set.
#include "problem.h"

#include "simd.h"

#include "activations.h"

#include "crew.h"

#include "gemm.h"

#include "solve.h"

#include "network.h"

#include "rows.h"

#include "program.h"

#include "features.h"

#include "gradient.h"

#include "states.h"

namespace hjepa_fast::HJEPA_ISA {

template <class P, class T = typename P::Scalar>
constexpr Kernels<T> table = {
    LANES<T>,
    4 * MAX_MR,
    P::DEPTH,
    ld<T>,
    packed_size<P>,
    n_panels<T>,
    pack<P, T>,
    multiply<T>,
    forward_scratch<P, T>,
    forward<P, T>,
    backward_scratch<P, T>,
    backward<P, T>,
    shared_scratch<T>,
    thread_scratch<T>,
    forward_features<T>,
    program_forward_scratch<P, T>,
    program_forward<P, T>,
    program_backward_scratch<P, T>,
    program_backward<P, T>,
    gradient_scratch<P, T>,
    gradient<P, T>,
    gradient_backward_scratch<P, T>,
    gradient_backward<P, T>,
    states_scratch<T>,
    states_forward<T>,
    states_backward<T>,
    states_gradient<T>,
    states_gradient_backward<T>,
};

}  // namespace hjepa_fast::HJEPA_ISA
