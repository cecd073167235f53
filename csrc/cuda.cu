// The module danceopd_kernels._CUDA: operations 1 and 4 on a CUDA device, 16 bytes a load where addresses allow it.
#include <cuda_runtime.h>

#include "arguments.h"

namespace {

using namespace danceopd;

constexpr int THREADS = 256;

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T entry[V];
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* x) {
    return *reinterpret_cast<const Pack<T, V>*>(x);
}

template <class T, int V>
__device__ __forceinline__ void store(T* x, const Pack<T, V>& value) {
    *reinterpret_cast<Pack<T, V>*>(x) = value;
}

// The sum over a block, in thread 0.
__device__ float block_sum(float value) {
    __shared__ float warps[THREADS / 32];
    for (int lane = 16; lane; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    __syncthreads();  // thread 0 may still read the sums of the call before
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    if (threadIdx.x == 0)
        for (int i = 0; i < THREADS / 32; ++i) sum += warps[i];
    return sum;
}

// A block does one chunk of one sample; entries j, ..., j + V - 1 of the sample are one thread's at a time.
#define FOR_EACH_PACK(j, elements)                                                                             \
    for (int64_t j = blockIdx.x * CHUNK + threadIdx.x * V,                                                     \
                 end = (blockIdx.x + 1) * CHUNK < (elements) ? (blockIdx.x + 1) * CHUNK : (elements);          \
         j < end; j += THREADS * V)

template <class T, int V, bool GUIDED, bool MASKED, bool NORMS>
__global__ void __launch_bounds__(THREADS) routed_kernel(const RoutedVelocityMse p) {
    const int64_t sample = blockIdx.y, teacher = p.route[sample], here = sample * p.elements;
    const void *cond = p.teachers[0], *uncond = p.uncond[0];
    int64_t rows = teacher == 0 ? p.rows[0] : 0, uncond_rows = p.uncond_rows[0];
#pragma unroll
    for (int m = 1; m < MAX_TEACHERS; ++m)  // no indexing, which would put the addresses on the stack
        if (teacher == m) cond = p.teachers[m], uncond = p.uncond[m], rows = p.rows[m], uncond_rows = p.uncond_rows[m];
    int64_t row = p.row[sample], uncond_row = GUIDED ? p.uncond_row[sample] : 0;
    // A row that is not there is not read, and its sample's loss and gradient are NaN.
    const bool there = row >= 0 && row < rows && (!GUIDED || (uncond_row >= 0 && uncond_row < uncond_rows));
    if (!there) cond = uncond = p.student, row = uncond_row = sample;
    row *= p.elements, uncond_row *= p.elements;
    const float scale = GUIDED ? p.guidance_scale[sample] : 1.f, factor = p.factor[sample];
    const uint32_t inner = MASKED ? static_cast<uint32_t>(p.inner) : 1;
    const uint8_t* mask = MASKED ? p.mask + sample * (static_cast<uint32_t>(p.elements) / inner) : nullptr;
    float sum = 0, velocities = 0, targets = 0;
    FOR_EACH_PACK(j, p.elements) {
        const auto v = load<T, V>(static_cast<const T*>(p.student) + here + j);
        const auto c = load<T, V>(static_cast<const T*>(cond) + row + j);
        const auto u = GUIDED ? load<T, V>(static_cast<const T*>(uncond) + uncond_row + j) : c;
        Pack<GradientOf<T>, V> gradient;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float velocity = to_float(v.entry[i]);
            float target = guided_velocity<GUIDED>(to_float(c.entry[i]), to_float(u.entry[i]), scale);
            if (!there) target = NAN;
            const bool kept = !MASKED || mask[static_cast<uint32_t>(j + i) / inner];
            const float error = kept ? velocity - target : 0.f;
            sum += error * error;
            if (NORMS && kept) velocities += velocity * velocity, targets += target * target;
            gradient.entry[i] = from_float<GradientOf<T>>(kept ? factor * error : 0.f);  // not 0 times infinity
        }
        store<GradientOf<T>, V>(static_cast<GradientOf<T>*>(p.gradient) + here + j, gradient);
    }
    const int64_t at = sample * gridDim.x + blockIdx.x, plane = static_cast<int64_t>(gridDim.y) * gridDim.x;
    sum = block_sum(sum);
    if (threadIdx.x == 0) p.sums[at] = sum;
    if (NORMS) {
        velocities = block_sum(velocities);
        targets = block_sum(targets);
        if (threadIdx.x == 0) p.sums[plane + at] = velocities, p.sums[2 * plane + at] = targets;
    }
}

template <class T, int V, bool GUIDED, bool HEUN>
__global__ void __launch_bounds__(THREADS) step_kernel(const Step p) {
    const int64_t sample = blockIdx.y, here = sample * p.elements;
    if (p.active && !p.active[sample]) return;
    const float scale = GUIDED ? p.guidance_scale[sample] : 1.f, dt = p.next_sigma[sample] - p.sigma[sample];
    FOR_EACH_PACK(j, p.elements) {
        auto z = load<T, V>(static_cast<const T*>(p.z) + here + j);
        const auto v = load<T, V>(static_cast<const T*>(p.velocity) + here + j);
        const auto u = GUIDED ? load<T, V>(static_cast<const T*>(p.uncond) + here + j) : v;
        const auto w = HEUN ? load<T, V>(static_cast<const T*>(p.other) + here + j) : v;
        const auto t = HEUN && GUIDED ? load<T, V>(static_cast<const T*>(p.other_uncond) + here + j) : w;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            float velocity = guided_velocity<GUIDED>(to_float(v.entry[i]), to_float(u.entry[i]), scale);
            if (HEUN) velocity = (velocity + guided_velocity<GUIDED>(to_float(w.entry[i]), to_float(t.entry[i]), scale)) / 2;
            z.entry[i] = from_float<T>(to_float(z.entry[i]) + dt * velocity);
        }
        store<T, V>(static_cast<T*>(p.z) + here + j, z);
    }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS) sde_kernel(const SdeStep p) {
    const int64_t sample = blockIdx.y, here = sample * p.elements;
    const bool active = !p.active || p.active[sample];
    const SdeFactors f = sde_factors(p.sigma[sample], p.next_sigma[sample], *p.pole, p.noise_level);
    float sum = 0;
    FOR_EACH_PACK(j, p.elements) {
        const auto noise = load<T, V>(static_cast<const T*>(p.noise) + here + j);
#pragma unroll
        for (int i = 0; i < V; ++i) sum += to_float(noise.entry[i]) * to_float(noise.entry[i]);
        if (!active) continue;
        auto z = load<T, V>(static_cast<const T*>(p.z) + here + j);
        const auto v = load<T, V>(static_cast<const T*>(p.velocity) + here + j);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float e = to_float(noise.entry[i]);
            z.entry[i] = from_float<T>(f.on_z * to_float(z.entry[i]) + f.on_velocity * to_float(v.entry[i]) + f.deviation * e);
        }
        store<T, V>(static_cast<T*>(p.z) + here + j, z);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) p.sums[sample * gridDim.x + blockIdx.x] = sum;
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// 16 bytes a load if every address and the samples' stride are multiples of it.
template <class T, class... Address>
bool wide(int64_t elements, Address... addresses) {
    return elements * sizeof(T) % 16 == 0 && (aligned(addresses) && ...);
}

template <class T, int V, bool NORMS>
void launch_routed(const RoutedVelocityMse& p, dim3 grid, cudaStream_t stream) {
    if (p.guided && p.mask) routed_kernel<T, V, true, true, NORMS><<<grid, THREADS, 0, stream>>>(p);
    else if (p.guided) routed_kernel<T, V, true, false, NORMS><<<grid, THREADS, 0, stream>>>(p);
    else if (p.mask) routed_kernel<T, V, false, true, NORMS><<<grid, THREADS, 0, stream>>>(p);
    else routed_kernel<T, V, false, false, NORMS><<<grid, THREADS, 0, stream>>>(p);
}

template <class T, int V>
void launch(const RoutedVelocityMse& p, dim3 grid, cudaStream_t stream) {
    p.norms ? launch_routed<T, V, true>(p, grid, stream) : launch_routed<T, V, false>(p, grid, stream);
}

template <class T, int V>
void launch(const Step& p, dim3 grid, cudaStream_t stream) {
    if (p.uncond && p.other) step_kernel<T, V, true, true><<<grid, THREADS, 0, stream>>>(p);
    else if (p.uncond) step_kernel<T, V, true, false><<<grid, THREADS, 0, stream>>>(p);
    else if (p.other) step_kernel<T, V, false, true><<<grid, THREADS, 0, stream>>>(p);
    else step_kernel<T, V, false, false><<<grid, THREADS, 0, stream>>>(p);
}

template <class T, int V>
void launch(const SdeStep& p, dim3 grid, cudaStream_t stream) {
    sde_kernel<T, V><<<grid, THREADS, 0, stream>>>(p);
}

template <class T>
bool wide(const RoutedVelocityMse& p) {
    bool all = wide<T>(p.elements, p.student, p.gradient);
    for (int m = 0; m < MAX_TEACHERS; ++m) all = all && aligned(p.teachers[m]) && aligned(p.uncond[m]);
    return all;
}

template <class T>
bool wide(const Step& p) {
    return wide<T>(p.elements, static_cast<const void*>(p.z), p.velocity, p.uncond, p.other, p.other_uncond);
}

template <class T>
bool wide(const SdeStep& p) {
    return wide<T>(p.elements, static_cast<const void*>(p.z), p.velocity, p.noise);
}

template <class T, class Problem>
void launch_for(const Problem& p, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(chunks_of(p.elements)), static_cast<unsigned>(p.samples));
    wide<T>(p) ? launch<T, 16 / sizeof(T)>(p, grid, stream) : launch<T, 1>(p, grid, stream);
}

template <class Problem>
void run(const std::string& dtype, const pybind11::dict& values, uintptr_t stream_address) {
    const Problem p = read(values, static_cast<Problem*>(nullptr));
    if (p.elements > UINT32_MAX) throw std::invalid_argument("a sample of more than 2^32 elements");
    const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
    switch (format_of(dtype)) {
        case Format::float32: launch_for<float>(p, stream); break;
        case Format::bfloat16: launch_for<bfloat16>(p, stream); break;
        case Format::float16: launch_for<float16>(p, stream); break;
    }
    if (const cudaError_t error = cudaGetLastError()) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(_CUDA, module) {
    module.attr("CHUNK") = CHUNK;
    module.def("routed_velocity_mse", run<RoutedVelocityMse>);
    module.def("step", run<Step>);
    module.def("sde_step", run<SdeStep>);
}
