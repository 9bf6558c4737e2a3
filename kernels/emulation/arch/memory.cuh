#pragma once

#include <cstring>

#include "cuda_runtime.h"

namespace ep::arch {

template <class T>
T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
void store(void* p, T v) {
  std::memcpy(p, &v, sizeof(v));
}

// Single words are what kernels poll lane by lane, so others get a turn before.
inline uint64_t poll(const void* p) {
  emu::yield();
  return __atomic_load_n(static_cast<const uint64_t*>(p), __ATOMIC_ACQUIRE);
}

inline void post(void* p, uint64_t v) {
  __atomic_store_n(static_cast<uint64_t*>(p), v, __ATOMIC_RELEASE);
}

inline uint64_t ld_relaxed_sys_u64(const void* p) { return poll(p); }
inline uint64_t ld_acquire_sys_u64(const void* p) { return poll(p); }
inline uint64_t ld_relaxed_gpu_u64(const void* p) { return poll(p); }
inline uint64_t ld_acquire_gpu_u64(const void* p) { return poll(p); }
inline void st_relaxed_sys_u64(void* p, uint64_t v) { post(p, v); }
inline void st_release_sys_u64(void* p, uint64_t v) { post(p, v); }
inline void st_release_gpu_u64(void* p, uint64_t v) { post(p, v); }
inline void st_relaxed_gpu_u64(void* p, uint64_t v) { post(p, v); }

inline uint4 ld_relaxed_sys_v4(const void* p) { return load<uint4>(p); }
inline uint2 ld_relaxed_sys_v2(const void* p) { return load<uint2>(p); }
inline uint4 ld_stream_v4(const void* p) { return load<uint4>(p); }
inline void st_relaxed_sys_v4(void* p, uint4 v) { store(p, v); }

inline uint32_t atom_add_acq_rel_gpu_u32(void* p, uint32_t v) {
  return __atomic_fetch_add(static_cast<uint32_t*>(p), v, __ATOMIC_ACQ_REL);
}

inline uint32_t atom_exch_relaxed_gpu_u32(void* p, uint32_t v) {
  emu::yield();
  return __atomic_exchange_n(static_cast<uint32_t*>(p), v, __ATOMIC_RELAXED);
}

inline uint64_t atom_cas_acq_rel_gpu_u64(void* p, uint64_t expect, uint64_t v) {
  emu::yield();
  __atomic_compare_exchange_n(static_cast<uint64_t*>(p), &expect, v, false, __ATOMIC_ACQ_REL,
                              __ATOMIC_ACQUIRE);
  return expect;
}

inline uint64_t atom_max_relaxed_gpu_u64(void* p, uint64_t v) {
  const uint64_t old = load<uint64_t>(p);
  if (v > old) post(p, v);
  return old;
}

inline uint64_t atom_add_relaxed_gpu_u64(void* p, uint64_t v) {
  return __atomic_fetch_add(static_cast<uint64_t*>(p), v, __ATOMIC_RELAXED);
}

inline void red_and_relaxed_gpu_u64(void* p, uint64_t v) {
  __atomic_fetch_and(static_cast<uint64_t*>(p), v, __ATOMIC_RELAXED);
}

inline uint64_t opaque(uint64_t v) { return v; }

inline void fence_acq_rel_sys() { emu::yield(); }
inline void fence_sc_gpu() { emu::yield(); }

}  // namespace ep::arch
