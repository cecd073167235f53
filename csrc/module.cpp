// The compiled module danceopd_kernels._C: plain addresses in, nothing of torch needed to build it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "cpu.h"

namespace {

using namespace danceopd;

const char* instruction_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return "avx512";
    unsigned a, b, features, d;  // not every compiler knows F16C by name
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &features, &d) &&
        features & bit_F16C)
        return "avx2";
#endif
    return "base";
}

const CpuKernels* kernels_of(const std::string& set) {
#if defined(__x86_64__)
    if (set == "avx512") return &avx512::kernels;
    if (set == "avx2") return &avx2::kernels;
#endif
    return &base::kernels;
}

const CpuKernels* kernels = kernels_of(instruction_set());

void use(const std::string& set) {
    const std::string widest = instruction_set();
    if (set != "base" && set != widest && !(set == "avx2" && widest == "avx512"))
        throw std::invalid_argument("no instruction set " + set + " on this processor");
    kernels = kernels_of(set);
}

template <class Problem>
auto launcher(void (*const CpuKernels::*kernel)(const Problem&, Format, int)) {
    return [kernel](const std::string& dtype, const pybind11::dict& values, int threads) {
        const Problem problem = read(values, static_cast<Problem*>(nullptr));
        const Format format = format_of(dtype);
        check(problem);
        pybind11::gil_scoped_release release;
        (kernels->*kernel)(problem, format, threads);
    };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("instruction_set", instruction_set, "The widest instruction set of this processor that is built in.");
    module.def("use", use, "Run the kernels of another instruction set: base, avx2 or avx512.");
    module.attr("CHUNK") = CHUNK;
    module.def("routed_velocity_mse", launcher<RoutedVelocityMse>(&CpuKernels::routed_velocity_mse));
    module.def("step", launcher<Step>(&CpuKernels::step));
    module.def("sde_step", launcher<SdeStep>(&CpuKernels::sde_step));
    module.def("quantize", launcher<Quantize>(&CpuKernels::quantize));
}
