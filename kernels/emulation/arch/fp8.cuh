#pragma once

#include <cmath>
#include <cstdint>

namespace ep::arch {

// Nearest even, saturating to 448; 0x7f if it is no number.
inline uint32_t e4m3_rn_satfinite(float v) {
  const uint32_t sign = std::signbit(v) ? 0x80 : 0;
  if (std::isnan(v)) return 0x7f;
  const double magnitude = std::fabs(static_cast<double>(v));
  if (magnitude == 0) return sign;
  if (magnitude >= 448) return sign | 0x7e;
  // In units of the last place, of which there are eight to a power of two, 2^-9 the least.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = exponent - 4 > -9 ? exponent - 4 : -9;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // Below eight units it is subnormal; what rounds up to sixteen is the next power's first.
  const uint32_t code = static_cast<uint32_t>(unit + 9) * 8 + units;
  return sign | (code > 0x7e ? 0x7e : code);
}

inline uint32_t cvt_e4m3x2_rn_satfinite(float lo, float hi) {
  return e4m3_rn_satfinite(lo) | e4m3_rn_satfinite(hi) << 8;
}

}  // namespace ep::arch
