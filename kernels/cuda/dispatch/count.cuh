// The placers' task while nothing has arrived: to count entries.
#pragma once

#include "dispatch/entries.cuh"

namespace ep {
namespace {

__device__ __forceinline__ uint32_t placer() { return threadIdx.x - kSenders; }

// Where entries are counted: running counts begin at `rank_rows`, those of all tokens at `totals`.
struct Counts {
  uint32_t* rank_rows;
  uint32_t* expert_rows;
  uint32_t* none;  // the lane's
  __device__ __forceinline__ Counts(const Shared& s, uint32_t at)
      : rank_rows(shared_at<uint32_t>(at)),
        expert_rows(shared_at<uint32_t>(at + s.expert_rows - s.rank_rows)),
        none(shared_at<uint32_t>(s.none) + threadIdx.x % 32) {}
  // Without branches: a lane that has nothing to count counts it elsewhere.
  __device__ __forceinline__ void add_entry(bool valid, uint32_t expert) const {
    atomicAdd(valid ? &expert_rows[expert] : none, uint32_t{valid});
  }
  __device__ __forceinline__ void add_row(bool leads, uint32_t owner) const {
    atomicAdd(leads ? &rank_rows[owner] : none, uint32_t{leads});
  }
  // A row of each lane for each of its ranks; bit r: rank r. One warp.
  __device__ __forceinline__ void add_rows(uint32_t ranks, uint32_t num_ranks) const {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t first = 0; first < num_ranks; first += 4) {
      // Four bits to the low bits of four bytes, which are summed side by side.
      const uint32_t bytes = (ranks >> first & 0xfu) * 0x00204081u & 0x01010101u;
      const uint32_t rows = __reduce_add_sync(~0u, bytes) >> (8 * lane & 31) & 0xffu;
      atomicAdd(lane < 4 && first + lane < num_ranks ? &rank_rows[first + lane] : none, rows);
    }
  }
};

// How many tokens a warp of placers looks at together.
template <class P>
__device__ __forceinline__ uint32_t tokens_per_warp(const P& p) {
  return p.plan.whole_tokens ? 32 : EntryLane(p.plan.entry_shift).tokens_per_warp();
}

// What a placer looks at when the placers' tokens begin at `base`; -1 from token `to` on.
template <class P>
__device__ __forceinline__ TokenIds load_ids(const P& p, uint32_t base, uint32_t to) {
  const int64_t* ids = reinterpret_cast<const int64_t*>(p.a.topk_idx);
  const uint32_t top_k = p.a.handle.top_k;
  TokenIds of;
  if (p.plan.whole_tokens) {
    const uint32_t t = base + placer();
#pragma unroll
    for (uint32_t k = 0; k < TokenIds::kMost; ++k)
      of.id[k] = t < to && k < top_k ? ids[uint64_t{t} * top_k + k] : -1;
  } else {
    const EntryLane e(p.plan.entry_shift);
    const uint32_t t = base + placer() / 32 * e.tokens_per_warp() + e.token;
    of.id[0] = t < to && e.k < top_k ? ids[uint64_t{t} * top_k + e.k] : -1;
  }
  return of;
}

// Counts the entries of tokens [0, to). `ids` is load_ids at 0. All placers.
template <class P>
__device__ __forceinline__ void count_entries(const P& p, const Counts& counts, TokenIds ids,
                                              uint32_t to) {
  const uint32_t mine = placer() / 32 * tokens_per_warp(p);
  const uint32_t step = P::kPlacerWarps * tokens_per_warp(p);
#pragma unroll 1
  for (uint32_t base = 0; base + mine < to; base += step) {
    const TokenIds of = ids;
    if (base + step < to) ids = load_ids(p, base + step, to);
    if (p.plan.whole_tokens) {
      uint32_t expert[TokenIds::kMost];
      uint32_t owners = 0;
#pragma unroll
      for (uint32_t k = 0; k < TokenIds::kMost; ++k) {
        expert[k] = expert_of(p, of.id[k]);
        bool valid = expert[k] != kNowhere;
#pragma unroll
        for (uint32_t j = 0; j < k; ++j) valid &= expert[j] != expert[k];
        const uint32_t owner = 1u << p.plan.local_experts.quotient(expert[k]) % 32;
        owners |= expert[k] != kNowhere ? owner : 0;
        counts.add_entry(valid, expert[k]);
      }
      counts.add_rows(owners, p.a.group.num_ranks);
    } else {
      const Entry e = classify(p, EntryLane(p.plan.entry_shift), expert_of(p, of.id[0]));
      counts.add_entry(e.valid, e.expert);
      counts.add_row(e.leads, e.owner);
    }
  }
}

// Tells every rank how many rows it gets, and how many of them go to each of its experts. All
// placers.
template <class P>
__device__ __forceinline__ void send_counts(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const Divisor& per_rank = p.plan.packets_per_source;
  const Counts totals(s, s.totals);
  const uint64_t mine = p.counts_at(0, g.rank, epoch);
#pragma unroll 1
  for (uint32_t i = placer(); i < g.num_ranks * per_rank.value; i += P::kPlacers) {
    const uint32_t rank = per_rank.quotient(i);
    const uint32_t at = i - rank * per_rank.value;
    const uint64_t partner = shared_at<uint64_t>(s.partners)[rank];
    const uint32_t value = at == 0 ? totals.rank_rows[rank]
                                   : totals.expert_rows[rank * p.plan.local_experts.value + at - 1];
    if (partner != 0)
      arch::st_relaxed_sys_u64(reinterpret_cast<uint64_t*>(partner + mine) + at,
                               packet(value, epoch));
  }
}

// Clears shared memory from one offset to another, both multiples of 16. All placers.
template <class P>
__device__ __forceinline__ void clear(uint32_t from, uint32_t to) {
#pragma unroll 1
  for (uint32_t i = from + 16 * placer(); i < to; i += 16 * P::kPlacers) *shared_at<uint4>(i) = {};
}

// Whether this block tells the ranks their counts: the one that most often has no token.
template <class P>
__device__ __forceinline__ bool tells_counts(const P& p) {
  return blockIdx.x == p.plan.last_block;
}

// The placers' task while nothing has arrived: the entries before the block's tokens, and in one
// block those of all tokens. `first` is load_ids at 0.
template <class P>
__device__ __forceinline__ void count(const P& p, const Shared& s, const Chunk& chunk,
                                      const TokenIds& first) {
  Fixed* fixed = shared_at<Fixed>(s.fixed);
  if (chunk.size() != 0) {
    count_entries(p, Counts(s, s.rank_rows), first, chunk.from);
    arch::mbarrier_arrive_release_cta(&fixed->counted);
  }
  if (!tells_counts(p)) return;
  const uint32_t tokens = p.a.handle.num_tokens;
  // Of a block that has no token, chunk.from is the number of tokens.
  count_entries(p, Counts(s, s.totals), chunk.size() == 0 ? first : load_ids(p, 0, tokens), tokens);
  arch::bar_sync(kTotalBarrier, P::kPlacers);
  await(&fixed->known, 0);
  send_counts(p, s, fixed->send_epoch);
}

}  // namespace
}  // namespace ep
