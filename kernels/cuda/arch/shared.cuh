// What a block has in shared memory, as kernels declare it.
#pragma once

#include <cstdint>

namespace ep::arch {

template <class T>
using Same = T;

}  // namespace ep::arch

// A variable of the block. `type` may be an array's.
#define EP_SHARED(type, name) __shared__ ::ep::arch::Same<type> name

// The dynamic shared memory, as an array.
#define EP_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
