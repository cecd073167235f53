// What the kernels work on: plain addresses, of host memory in cpu.inc and of device memory in cuda.cu.
#pragma once

#include <type_traits>

#include "common.h"

namespace danceopd {

constexpr int MAX_TEACHERS = 8;

// One entry for each sample unless it is said otherwise; pointers that are not used are null.
struct RoutedVelocityMse {
    const void* student;               // [samples, elements]
    const void* teachers[MAX_TEACHERS];  // each [its rows, elements]
    const void* uncond[MAX_TEACHERS];    // the same; may be the very same tensors
    int count;                         // of teachers
    int64_t rows[MAX_TEACHERS];        // of each teacher's tensor
    int64_t uncond_rows[MAX_TEACHERS];
    bool guided;                       // without, uncond is not looked at
    bool norms;                        // whether the squares of velocity and target are summed too
    const int64_t* route;
    const int64_t* row;                // of the sample in its teacher's tensor; null on the host, which counts
    const int64_t* uncond_row;         // in its uncond's; null on the host: as row
    const float* guidance_scale;
    const float* factor;               // of the gradient: 2 weight / count
    const uint8_t* mask;               // [samples, elements / inner], or null
    int64_t inner;                     // elements that one entry of the mask covers
    void* gradient;                    // [samples, elements], in GradientOf the student's format
    float* sums;                       // [1 or 3, samples, chunks]: of squared errors; of velocity's and target's squares
    int64_t samples, elements;
};

// z += (next_sigma - sigma) v, v guided, or the mean with a second velocity.
struct Step {
    void* z;                           // [samples, elements]
    const void *velocity, *uncond, *other, *other_uncond;  // [samples, elements], or null
    const float *sigma, *next_sigma, *guidance_scale;
    const uint8_t* active;             // or null
    int64_t samples, elements;
};

struct SdeStep {
    void* z;                           // [samples, elements]
    const void *velocity, *noise;      // [samples, elements]
    const float *sigma, *next_sigma;
    const float* pole;                 // one number: what stands in for sigma = 1
    float noise_level;
    const uint8_t* active;             // or null
    float* sums;                       // [samples, chunks], of squared noise
    int64_t samples, elements;
};

// Rows to e4m3 with a scale each, after a norm and a modulation if asked.
struct Quantize {
    const void* x;                     // [rows, columns]
    const void *scale, *shift;         // [rows / rows_per_sample, columns], or null
    int64_t rows_per_sample;
    bool norm;
    float eps;
    uint8_t* q;                        // [rows, columns]
    float* row_scale;                  // [rows]
    int64_t rows, columns;
};

// float16 would lose small gradients, and overflow with large weights, before they are scaled by what comes after.
template <class T>
using GradientOf = std::conditional_t<std::is_same<T, float16>::value, float, T>;

constexpr int64_t CHUNK = 8192;  // elements of one piece of work

DANCEOPD_BOTH int64_t chunks_of(int64_t elements) { return (elements + CHUNK - 1) / CHUNK; }

}  // namespace danceopd
