// The words that kernel bodies are written in, for three compilers.
//
// nvcc and NVRTC compile the bodies for a GPU, and NVRTC without any header of CUDA: half precision is bits and PTX.
// g++ compiles the same text for tests: device_on_host.h (tests/host_gpu) then runs every thread as a fiber.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#define PSD_DEVICE static __device__ __forceinline__
#define PSD_MEMBER __device__ __forceinline__
#define PSD_SPECIAL __device__ __forceinline__
#define PSD_CONSTEXPR __host__ __device__ constexpr
#define PSD_SHARED(type, name, count) __shared__ __align__(16) type name[count]

// A kernel takes one struct by value: the same bytes from torch, TensorRT, the driver API and the tests. `blocks` of
// them are to fit on a multiprocessor, which bounds the registers.
#define PSD_ENTRY(name, Args, threads, blocks, call) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args) { call; }

#else
#include "device_on_host.h"
#endif

namespace psdiff {

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

// Scalars of 16 bits; arithmetic is done in float.
struct half_t {
  u16 bits;
};
struct bfloat16_t {
  u16 bits;
};

constexpr int kWarp = 32;
constexpr u32 kFullWarp = 0xffffffffu;

}  // namespace psdiff
