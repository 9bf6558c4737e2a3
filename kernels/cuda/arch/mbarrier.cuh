// A barrier object in shared memory, for waits that do something else meanwhile.
#pragma once

#include <cstdint>

namespace ep::arch {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Phase 0 completes after `count` arrivals. Other threads may use it after a barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// Arrives; releases what this thread has written or seen to the threads of the block.
__device__ __forceinline__ void mbarrier_arrive_release_cta(uint64_t* barrier) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.release.cta.shared::cta.b64 state, [%0]; }" ::"r"(
          shared_address(barrier))
      : "memory");
}

// Whether the phase of this parity is complete; if so, acquires what arriving threads released.
__device__ __forceinline__ bool mbarrier_test_acquire_cta(const uint64_t* barrier,
                                                          uint32_t parity) {
  uint32_t complete;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; "
               "selp.u32 %0, 1, 0, p; }"
               : "=r"(complete)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return complete != 0;
}

// Waits for the phase of this parity, as long as those may take who arrive; acquires like the test.
__device__ __forceinline__ void mbarrier_wait_acquire_cta(const uint64_t* barrier,
                                                          uint32_t parity) {
  uint32_t complete;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], "
                 "%2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(complete)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (complete == 0);
}

}  // namespace ep::arch
