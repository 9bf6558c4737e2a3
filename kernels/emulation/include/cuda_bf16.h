// What the kernels use of CUDA's header of this name.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x = 0, y = 0;
};

inline float ep_bf16_to_float(uint16_t v) { return __uint_as_float(uint32_t{v} << 16); }

inline uint16_t ep_float_to_bf16(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (std::isnan(v)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float __low2float(__nv_bfloat162 v) { return ep_bf16_to_float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return ep_bf16_to_float(v.y); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {ep_float_to_bf16(x), ep_float_to_bf16(y)};
}
inline __nv_bfloat162 __habs2(__nv_bfloat162 v) {
  return {static_cast<uint16_t>(v.x & 0x7fff), static_cast<uint16_t>(v.y & 0x7fff)};
}
// The other where one is no number.
inline uint16_t ep_max_bf16(uint16_t a, uint16_t b) {
  return ep_float_to_bf16(std::fmax(ep_bf16_to_float(a), ep_bf16_to_float(b)));
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {ep_max_bf16(a.x, b.x), ep_max_bf16(a.y, b.y)};
}
inline __nv_bfloat162 __shfl_xor_sync(unsigned, __nv_bfloat162 v, int mask,
                                      int line = __builtin_LINE()) {
  const uint32_t word = emu::collective(emu::Collective::kShuffleXor, uint32_t{v.y} << 16 | v.x,
                                        static_cast<uint32_t>(mask), line);
  return {static_cast<uint16_t>(word), static_cast<uint16_t>(word >> 16)};
}
