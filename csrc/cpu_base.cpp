#include "cpu.h"

namespace danceopd {
namespace base {

constexpr int64_t LANES = 1;

static void widen_lanes(const float16* x, float* wide, int64_t n) {
    for (int64_t j = 0; j < n; ++j) wide[j] = to_float(x[j]);
}

static void narrow_lanes(const float* wide, float16* x, int64_t n) {
    for (int64_t j = 0; j < n; ++j) x[j] = from_float<float16>(wide[j]);
}

}  // namespace base
}  // namespace danceopd

#define ISA base
#include "cpu.inc"
