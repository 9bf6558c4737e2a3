// Conversions between float32 and E4M3.
#pragma once

#include <cstdint>

namespace ep::arch {

// Two floats to E4M3, nearest even, saturating to 448; `lo` in the low byte.
__device__ __forceinline__ uint32_t cvt_e4m3x2_rn_satfinite(float lo, float hi) {
  uint16_t v;
  asm volatile("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(hi), "f"(lo) : "memory");
  return v;
}

// Two E4M3 bytes to two halves, exactly; low byte in the low half.
__device__ __forceinline__ uint32_t cvt_f16x2_e4m3x2(uint16_t v) {
  uint32_t h;
  asm volatile("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(v) : "memory");
  return h;
}

}  // namespace ep::arch
