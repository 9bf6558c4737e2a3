// Division on the device by numbers that the host knows.
#pragma once

#include <cstdint>

namespace ep {

// Division by a number that does not change during a launch. Exact for dividends and divisors whose
// product is below 2^31.
struct Divisor {
  uint32_t value;
  uint32_t inverse;  // ceil(2^31 / value)
  explicit Divisor(uint32_t v) : value(v), inverse((0x7fffffffu + v) / v) {}
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return __umulhi(2 * n, inverse);
  }
};

}  // namespace ep
