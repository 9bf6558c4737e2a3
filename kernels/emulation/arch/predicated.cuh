#pragma once

#include "mbarrier.cuh"
#include "memory.cuh"

namespace ep::arch {

template <class T>
void store_if(bool p, void* to, T v) {
  if (p) store(to, v);
}

inline void st_v4_if(bool p, void* to, uint4 v) { store_if(p, to, v); }
inline void st_v2_if(bool p, void* to, uint2 v) { store_if(p, to, v); }
inline void st_u32_if(bool p, void* to, uint32_t v) { store_if(p, to, v); }
inline void st_relaxed_sys_v4_if(bool p, void* to, uint4 v) { store_if(p, to, v); }
inline void st_shared_v4_if(bool p, void* to, uint4 v) { store_if(p, to, v); }
inline void st_shared_u64_if(bool p, void* to, uint64_t v) { store_if(p, to, v); }
inline void st_shared_u32_if(bool p, void* to, uint32_t v) { store_if(p, to, v); }
inline void st_shared_u8_if(bool p, void* to, uint32_t v) {
  store_if(p, to, static_cast<uint8_t>(v));
}
inline uint64_t ld_shared_u64_if(bool p, const void* from) { return p ? load<uint64_t>(from) : 0; }
inline uint32_t ld_shared_u32_if(bool p, const void* from) { return p ? load<uint32_t>(from) : 0; }

}  // namespace ep::arch
