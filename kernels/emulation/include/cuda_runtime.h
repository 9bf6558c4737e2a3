// What the kernels and their launchers use of CUDA's header of this name.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "emulator.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline int __popc(uint32_t v) { return std::popcount(v); }
inline int __ffs(uint32_t v) { return v == 0 ? 0 : std::countr_zero(v) + 1; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline float __frcp_rn(float v) { return 1.0f / v; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline uint32_t atomicAdd(uint32_t* at, uint32_t v) {
  const uint32_t old = *at;
  *at = old + v;
  return old;
}

inline void __syncthreads() { emu::barrier(0, 0, false); }

#define EP_COLLECTIVE(name, kind)                                                                  \
  inline uint32_t name(unsigned, uint32_t v, int line = __builtin_LINE()) {                        \
    return emu::collective(emu::Collective::kind, v, 0, line);                                     \
  }
EP_COLLECTIVE(__ballot_sync, kBallot)
EP_COLLECTIVE(__match_any_sync, kMatch)
EP_COLLECTIVE(__reduce_add_sync, kAdd)
EP_COLLECTIVE(__reduce_or_sync, kOr)
EP_COLLECTIVE(__reduce_min_sync, kMin)
EP_COLLECTIVE(__reduce_max_sync, kMax)
#undef EP_COLLECTIVE
inline void __syncwarp(int line = __builtin_LINE()) {
  emu::collective(emu::Collective::kSync, 0, 0, line);
}
inline bool __all_sync(unsigned, bool v, int line = __builtin_LINE()) {
  return emu::collective(emu::Collective::kBallot, v, 0, line) == ~0u;
}
inline bool __any_sync(unsigned, bool v, int line = __builtin_LINE()) {
  return emu::collective(emu::Collective::kBallot, v, 0, line) != 0;
}
inline uint32_t __shfl_sync(unsigned, uint32_t v, uint32_t from, int line = __builtin_LINE()) {
  return emu::collective(emu::Collective::kShuffle, v, from, line);
}
inline float __shfl_sync(unsigned, float v, uint32_t from, int line = __builtin_LINE()) {
  return __uint_as_float(
      emu::collective(emu::Collective::kShuffle, __float_as_uint(v), from, line));
}

// The runtime: one device that is always there.
constexpr size_t kMostSharedBytes = 227 * 1024;  // of a block, as on an H200
using CUcontext = void*;
using CUresult = int;
constexpr CUresult CUDA_SUCCESS = 0;
using PFN_cuCtxGetCurrent_v4000 = CUresult (*)(CUcontext*);
using PFN_cuCtxSetCurrent_v4000 = CUresult (*)(CUcontext);

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorSymbolNotFound = 500,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};
constexpr unsigned cudaEnableDefault = 0;
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// No thread has a context.
inline CUresult ep_no_context(CUcontext* context) {
  *context = nullptr;
  return CUDA_SUCCESS;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned,
                                                    cudaDriverEntryPointQueryResult* result) {
  *entry = reinterpret_cast<void*>(ep_no_context);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? static_cast<int>(emu::multiprocessors())
                                                       : static_cast<int>(kMostSharedBytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
// Returns once the kernel has ended.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  if (config->dynamicSmemBytes > kMostSharedBytes) return cudaErrorInvalidValue;
  emu::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
           [&] { kernel(args...); });
  return cudaSuccess;
}
