#pragma once

#include "emulator.h"

namespace ep::arch {

inline void mbarrier_init(uint64_t* barrier, uint32_t count) { emu::mbarrier_init(barrier, count); }

inline void mbarrier_arrive_release_cta(uint64_t* barrier) { emu::mbarrier_arrive(barrier); }

inline bool mbarrier_test_acquire_cta(const uint64_t* barrier, uint32_t parity) {
  return emu::mbarrier_test(barrier, parity);
}

inline void mbarrier_wait_acquire_cta(const uint64_t* barrier, uint32_t parity) {
  emu::mbarrier_wait(barrier, parity);
}

}  // namespace ep::arch
