// Accesses that a lane makes or not, without a branch: a warp whose lanes diverge takes tens of
// cycles for both ways and their meeting, over and over where it does so for each of many accesses.
//
// A load that a lane does not make leaves its result as it was. So the result is an operand, and
// two loads must not share one: the second would wait for the first to arrive.
#pragma once

#include <cstdint>

#include "mbarrier.cuh"

namespace ep::arch {

// `instruction` where operand `n` is not 0.
#define EP_IF(n, instruction) "{ .reg .pred p; setp.ne.u32 p, %" #n ", 0; @p " instruction "; }"

__device__ __forceinline__ void st_v4_if(bool p, void* to, uint4 v) {
  asm volatile(EP_IF(0, "st.global.v4.u32 [%1], {%2, %3, %4, %5}")::"r"(uint32_t{p}), "l"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void st_v2_if(bool p, void* to, uint2 v) {
  asm volatile(EP_IF(0, "st.global.v2.u32 [%1], {%2, %3}")::"r"(uint32_t{p}), "l"(to), "r"(v.x),
               "r"(v.y)
               : "memory");
}

__device__ __forceinline__ void st_u32_if(bool p, void* to, uint32_t v) {
  asm volatile(EP_IF(0, "st.global.u32 [%1], %2")::"r"(uint32_t{p}), "l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void st_relaxed_sys_v4_if(bool p, void* to, uint4 v) {
  asm volatile(EP_IF(0, "st.relaxed.sys.global.v4.u32 [%1], {%2, %3, %4, %5}")::"r"(uint32_t{p}),
               "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void st_shared_v4_if(bool p, void* to, uint4 v) {
  asm volatile(EP_IF(0, "st.shared.v4.u32 [%1], {%2, %3, %4, %5}")::"r"(uint32_t{p}),
               "r"(shared_address(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void st_shared_u64_if(bool p, void* to, uint64_t v) {
  asm volatile(EP_IF(0, "st.shared.u64 [%1], %2")::"r"(uint32_t{p}), "r"(shared_address(to)), "l"(v)
               : "memory");
}

__device__ __forceinline__ void st_shared_u32_if(bool p, void* to, uint32_t v) {
  asm volatile(EP_IF(0, "st.shared.u32 [%1], %2")::"r"(uint32_t{p}), "r"(shared_address(to)), "r"(v)
               : "memory");
}

// The low byte of `v`.
__device__ __forceinline__ void st_shared_u8_if(bool p, void* to, uint32_t v) {
  asm volatile(EP_IF(0, "st.shared.u8 [%1], %2")::"r"(uint32_t{p}), "r"(shared_address(to)), "r"(v)
               : "memory");
}

// 0 where it is not made.
__device__ __forceinline__ uint64_t ld_shared_u64_if(bool p, const void* from) {
  uint64_t v = 0;
  asm volatile(EP_IF(1, "ld.shared.u64 %0, [%2]")
               : "+l"(v)
               : "r"(uint32_t{p}), "r"(shared_address(from))
               : "memory");
  return v;
}

// 0 where it is not made.
__device__ __forceinline__ uint32_t ld_shared_u32_if(bool p, const void* from) {
  uint32_t v = 0;
  asm volatile(EP_IF(1, "ld.shared.u32 %0, [%2]")
               : "+r"(v)
               : "r"(uint32_t{p}), "r"(shared_address(from))
               : "memory");
  return v;
}

#undef EP_IF

}  // namespace ep::arch
