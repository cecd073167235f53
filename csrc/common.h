// Number formats, and the arithmetic of one element, written once for host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DANCEOPD_BOTH __host__ __device__ __forceinline__
#else
#define DANCEOPD_BOTH inline __attribute__((always_inline))
#endif

namespace danceopd {

enum class Format { float32, bfloat16, float16 };

#if defined(__CUDACC__)

using bfloat16 = __nv_bfloat16;
using float16 = __half;

#else

struct bfloat16 {
    uint16_t bits;
};

struct float16 {
    uint16_t bits;
};

#endif

DANCEOPD_BOTH uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

DANCEOPD_BOTH float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

DANCEOPD_BOTH float to_float(float x) { return x; }

#if defined(__CUDACC__)

DANCEOPD_BOTH float to_float(bfloat16 x) { return __bfloat162float(x); }
DANCEOPD_BOTH float to_float(float16 x) { return __half2float(x); }

template <class T>
DANCEOPD_BOTH T from_float(float x);
template <>
DANCEOPD_BOTH float from_float<float>(float x) {
    return x;
}
template <>
DANCEOPD_BOTH bfloat16 from_float<bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
DANCEOPD_BOTH float16 from_float<float16>(float x) {
    return __float2half_rn(x);
}

#else

// By bit arithmetic, without branches, so that compilers turn a loop over it into vector instructions.

DANCEOPD_BOTH float to_float(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

DANCEOPD_BOTH float to_float(float16 x) {
    const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);  // the exponent's bias grows from 15 to 127
    const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;       // infinity and NaN
    return float_of(sign | special | finite);
}

template <class T>
DANCEOPD_BOTH T from_float(float x);

template <>
DANCEOPD_BOTH float from_float<float>(float x) {
    return x;
}

// Round to the nearest, ties to even; NaN stays NaN.
template <>
DANCEOPD_BOTH bfloat16 from_float<bfloat16>(float x) {
    const uint32_t wide = bits_of(x), rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    return bfloat16{static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

template <>
DANCEOPD_BOTH float16 from_float<float16>(float x) {
    const uint32_t wide = bits_of(x), magnitude = wide & 0x7fffffffu;
    const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    // Below 2^-14 the spacing is 2^-24, the last place of 1/2, where the addition rounds.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return float16{static_cast<uint16_t>((wide >> 16 & 0x8000u) | (magnitude >= 0x477ff000u ? special : finite))};
}

#endif

// To the nearest e4m3, ties to even, no further than 448; NaN becomes e4m3's NaN.
DANCEOPD_BOTH uint8_t to_e4m3(float x) {
    const uint32_t wide = bits_of(x), sign = (wide >> 24) & 0x80u, magnitude = wide & 0x7fffffffu;
    const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    // Below 2^-6 the spacing is 2^-9: adding 2^14 rounds to it.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 16384.f) - bits_of(16384.f);
    const uint32_t code = magnitude < 0x3c800000u ? subnormal : normal < 0x7eu ? normal : 0x7eu;
    return static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : code));
}

// uncond + scale (cond - uncond); without guidance the conditional velocity itself.
template <bool GUIDED>
DANCEOPD_BOTH float guided_velocity(float cond, float uncond, float scale) {
    return GUIDED ? uncond + scale * (cond - uncond) : cond;
}

// One step of Flow-GRPO's stochastic process (arXiv 2505.05470, eq. 9): what z, velocity and noise are multiplied by.
struct SdeFactors {
    float on_z, on_velocity, deviation;
};

DANCEOPD_BOTH SdeFactors sde_factors(float sigma, float next_sigma, float pole, float noise_level) {
    const float dt = next_sigma - sigma;
    const float s2 = noise_level * noise_level * sigma / (1.f - (sigma == 1.f ? pole : sigma));
    return {1.f + s2 / (2.f * sigma) * dt, (1.f + s2 * (1.f - sigma) / (2.f * sigma)) * dt, sqrtf(s2 * -dt)};
}

}  // namespace danceopd
