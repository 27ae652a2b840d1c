#include <cstdint>
#include <initializer_list>

#define HJEPA_ISA generic
#define HJEPA_VECTOR_BYTES 16
#include "kernels.h"

namespace hjepa_fast {

extern const Kernels<float> generic_float;
extern const Kernels<double> generic_double;
const Kernels<float> generic_float = generic::table<generic::Plain<float>>;
const Kernels<double> generic_double = generic::table<generic::Plain<double>>;

}  // namespace hjepa_fast
