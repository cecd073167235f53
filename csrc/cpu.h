// The host kernels, compiled once for each instruction set.
#pragma once

#include "problems.h"

namespace danceopd {

struct CpuKernels {
    void (*routed_velocity_mse)(const RoutedVelocityMse&, Format, int threads);
    void (*step)(const Step&, Format, int threads);
    void (*sde_step)(const SdeStep&, Format, int threads);
    void (*quantize)(const Quantize&, Format, int threads);
};

namespace base {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}

}  // namespace danceopd
