#pragma once

#include "emulator.h"

namespace ep::arch {

inline void bar_sync(uint32_t id, uint32_t threads) { emu::barrier(id, threads, false); }

inline bool bar_or(uint32_t id, uint32_t threads, bool predicate) {
  return emu::barrier(id, threads, predicate);
}

inline uint64_t globaltimer_ns() {
  emu::yield();
  return emu::now_ns();
}

inline void sleep_ns(uint32_t) { emu::yield(); }

}  // namespace ep::arch
