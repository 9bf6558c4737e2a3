// A token's entries as a warp looks at them.
#pragma once

#include "dispatch/plan.cuh"

namespace ep {
namespace {

// Lanes of a warp that look at entries of the same token: a power of two of lanes a token.
struct EntryLane {
  uint32_t shift;
  uint32_t token;  // of the tokens that the warp looks at
  uint32_t k;
  __device__ __forceinline__ explicit EntryLane(uint32_t log2)
      : shift(log2), token((threadIdx.x % 32) >> log2), k(threadIdx.x & ((1u << log2) - 1)) {}
  __device__ __forceinline__ uint32_t width() const { return 1u << shift; }
  __device__ __forceinline__ uint32_t tokens_per_warp() const { return 32u >> shift; }
};

// The expert that an entry names, or kNowhere.
template <class P>
__device__ __forceinline__ uint32_t expert_of(const P& p, int64_t id) {
  return static_cast<uint64_t>(id) < p.a.group.num_experts ? static_cast<uint32_t>(id) : kNowhere;
}

// A lane's entry, and how it stands to its token's other entries.
struct Entry {
  uint32_t expert;
  uint32_t owner;
  uint32_t same;  // bit k: entry k, if it is valid, is of an expert of the same owner
  bool valid;     // names an expert that no earlier entry names
  bool leads;     // the token's first valid entry with this owner
};

// Looks at the entries of all lanes of the warp.
template <class P>
__device__ __forceinline__ Entry classify(const P& p, const EntryLane& e, uint32_t expert) {
  Entry entry;
  entry.expert = expert;
  // Beyond all ranks where no expert is named.
  entry.owner = p.plan.local_experts.quotient(expert);
  // Of the lanes that agree, those of the same token.
  const uint32_t first_lane = e.token << e.shift;
  const uint32_t lanes = e.width() == 32 ? ~0u : (1u << e.width()) - 1;
  entry.same = __match_any_sync(~0u, entry.owner) >> first_lane & lanes;
  const uint32_t twins = __match_any_sync(~0u, expert) >> first_lane & lanes;
  const uint32_t earlier = (1u << e.k) - 1;
  entry.valid = expert != kNowhere && (twins & earlier) == 0;
  // An earlier entry with this owner is valid, or repeats one that is.
  entry.leads = expert != kNowhere && (entry.same & earlier) == 0;
  return entry;
}

}  // namespace
}  // namespace ep
