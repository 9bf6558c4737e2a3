// What the tasks of a block share: its warps, its barriers, its shared memory.
#pragma once

#include "arch/mbarrier.cuh"
#include "arch/shared.cuh"
#include "group.cuh"
#include "line.cuh"

namespace ep {
namespace {

constexpr uint32_t kSenderWarps = 14;
constexpr uint32_t kSenders = 32 * kSenderWarps;

// How many warps have the other tasks, and how many lines a warp places at a time: more where there
// are many rows, fewer where every instruction of one warp is time for which the others wait.
template <uint32_t PlacerWarps, uint32_t ReaderWarps, uint32_t Loads>
struct Way {
  static constexpr uint32_t kLoads = Loads;  // of lines, in flight per lane and unit of placing
  static constexpr uint32_t kUnitLines = Loads * kLinesPerWarp;
  // With many tokens, what waiting warps read meanwhile others cannot: they watch one epoch only,
  // of the line that is stored last. With few it is faster to poll all lines.
  static constexpr bool kWatches = Loads > 1;
  static constexpr uint32_t kPlacerWarps = PlacerWarps;
  static constexpr uint32_t kRouterWarp = kSenderWarps + kPlacerWarps;
  static constexpr uint32_t kFirstReader = kRouterWarp + 1;
  static constexpr uint32_t kThreads = 32 * (kFirstReader + ReaderWarps);
  static constexpr uint32_t kPlacers = 32 * kPlacerWarps;
  static constexpr uint32_t kReaders = 32 * ReaderWarps;
};
using FewTokens = Way<6, 3, 1>;  // and lanes count whole tokens
using ManyTokens = Way<9, 4, 2>;

// Named barriers.
constexpr uint32_t kSendBarrier = 1;   // senders
constexpr uint32_t kReadBarrier = 2;   // readers
constexpr uint32_t kTotalBarrier = 3;  // placers

constexpr uint32_t kPlaces = 2;        // for tokens that are quantised, routed and sent, in turn
constexpr uint32_t kDestinations = 4;  // whose addresses are looked up at once
constexpr uint32_t kNowhere = ~0u;
constexpr uint32_t kChannelsPerScale = 128;

// What tasks tell each other. The barriers are for others to wait at.
struct Fixed {
  uint64_t send_epoch;
  uint64_t recv_epoch;
  uint64_t known;            // the epochs and `partners`
  uint64_t counted;          // the entries before the block's tokens
  uint64_t routed[kPlaces];  // a token: `row_base` and `header`
  uint64_t sent[kPlaces];    // a token: its place is free again
  uint64_t placeable;        // `begin`, `source_rows` and `most_rows`
  uint32_t most_rows;        // from one source
  uint32_t units_taken;      // of placing
};

// Offsets of what a block keeps in its dynamic shared memory.
struct Shared {
  uint32_t fixed;        // Fixed
  uint32_t partners;     // u64 [R] bases of the ranks that take part, else 0
  uint32_t source_rows;  // u32 [R] rows from each source
  uint32_t begin;        // u32 [L][R + 1] first row of each source
  uint32_t rank_rows;    // u32 [R] rows for each rank so far
  uint32_t expert_rows;  // u32 [E] entries of each expert so far
  uint32_t totals;       // both again, for all tokens
  uint32_t none;         // u32 [32] what lanes count that have nothing to count
  uint32_t row_base;     // u64 [kPlaces][D] where a token's row goes at each destination, or 0
  uint32_t header;       // u64 [kPlaces][D][1 + K]
  uint32_t rows;         // u8 [kPlaces][quantised_bytes]
  uint32_t bytes;

  Shared(const ep_group& g, uint32_t top_k, uint32_t hidden, bool fp8) {
    const uint32_t d = max_destinations(g, top_k);
    fixed = 0;
    partners = align16(sizeof(Fixed));
    source_rows = align16(partners + 8 * g.num_ranks);
    begin = align16(source_rows + 4 * g.num_ranks);
    rank_rows = align16(begin + 4 * (g.num_experts / g.num_ranks) * (g.num_ranks + 1));
    expert_rows = align16(rank_rows + 4 * g.num_ranks);
    totals = align16(expert_rows + 4 * g.num_experts);
    none = totals + (totals - rank_rows);
    row_base = none + 4 * 32;
    header = row_base + 8 * kPlaces * d;
    rows = align16(header + 8 * kPlaces * d * (1 + top_k));
    bytes = rows + (fp8 ? kPlaces * quantised_bytes(hidden) : 0);
  }

  static __host__ __device__ uint32_t align16(uint32_t at) { return (at + 15) & ~15u; }
  // Of a quantised row: its scales, then its body.
  static __host__ __device__ uint32_t scale_bytes(uint32_t hidden) {
    return align16(4 * (hidden / kChannelsPerScale));
  }
  static __host__ __device__ uint32_t quantised_bytes(uint32_t hidden) {
    return scale_bytes(hidden) + hidden;
  }
  // Of a token, rounded up to how many are looked up at once.
  static __host__ __device__ uint32_t max_destinations(const ep_group& g, uint32_t top_k) {
    return div_up(most_destinations(g, top_k), kDestinations) * kDestinations;
  }
};

template <class T>
__device__ __forceinline__ T* shared_at(uint32_t offset) {
  EP_DYNAMIC_SHARED(uint8_t, shared_memory);
  return reinterpret_cast<T*>(shared_memory + offset);
}

// Waits for the `n`th completion of a barrier, counted from 0. One warp.
__device__ __forceinline__ void await(const uint64_t* barrier, uint32_t n) {
  arch::mbarrier_wait_acquire_cta(barrier, n & 1);
  __syncwarp();
}

// Whether the readers are done.
__device__ __forceinline__ bool placeable(const Shared& s) {
  return arch::mbarrier_test_acquire_cta(&shared_at<Fixed>(s.fixed)->placeable, 0);
}

}  // namespace
}  // namespace ep
