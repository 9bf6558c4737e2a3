// Barriers among some warps of a block, and clocks.
#pragma once

#include <cstdint>

namespace ep::arch {

// Barrier `id` (1..15) of `threads` threads of the block.
__device__ __forceinline__ void bar_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same, and whether the predicate of any of the threads is true.
__device__ __forceinline__ bool bar_or(uint32_t id, uint32_t threads, bool predicate) {
  uint32_t any;
  asm volatile("{\n\t"
               ".reg .pred p, q;\n\t"
               "setp.ne.u32 p, %3, 0;\n\t"
               "bar.red.or.pred q, %1, %2, p;\n\t"
               "selp.u32 %0, 1, 0, q;\n\t"
               "}"
               : "=r"(any)
               : "r"(id), "r"(threads), "r"(uint32_t{predicate})
               : "memory");
  return any != 0;
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
