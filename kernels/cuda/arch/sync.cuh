// Barriers among some warps of a block, and clocks.
#pragma once

#include <cstdint>

namespace ep::arch {

// Barrier `id` (1..15) of `threads` threads of the block.
__device__ __forceinline__ void bar_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Nanoseconds since boot, the same clock on every multiprocessor; ticks of up to about a
// microsecond.
__device__ __forceinline__ uint64_t globaltimer_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

__device__ __forceinline__ void sleep_ns(uint32_t ns) {
  asm volatile("nanosleep.u32 %0;" ::"r"(ns) : "memory");
}

}  // namespace ep::arch
