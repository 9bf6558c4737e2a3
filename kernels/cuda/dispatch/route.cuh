// The router's task: slots and positions of the tokens that the block sends.
#pragma once

#include "arch/predicated.cuh"
#include "dispatch/entries.cuh"

namespace ep {
namespace {

// A lane's entry as it stands in memory.
struct RouterLoad {
  int64_t id = -1;
  float weight = 1.0f;
  __device__ __forceinline__ RouterLoad() {}
  template <class P>
  __device__ __forceinline__ RouterLoad(const P& p, const Chunk& chunk, uint32_t token) {
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t at = uint64_t{token} * p.a.handle.top_k + lane;
    if (token >= chunk.to || lane >= p.a.handle.top_k) return;
    id = reinterpret_cast<const int64_t*>(p.a.topk_idx)[at];
    if ((p.a.flags & EP_DISPATCH_WEIGHTS) != 0)
      weight = reinterpret_cast<const float*>(p.a.topk_weights)[at];
  }
};

// A lane's entry of a token that the router routes, as far as the token alone tells.
struct Routed {
  int64_t id;
  Entry entry;           // `same`: valid ones only
  uint32_t destination;  // index of its own
  float weight;
};

// Destinations are in the order of ranks after this one, so that at any time ranks send to
// different ones.
template <class P>
__device__ __forceinline__ Routed order_entries(const P& p, const RouterLoad& load) {
  const ep_group& g = p.a.group;
  Routed r;
  r.id = load.id;
  r.weight = load.weight;
  r.entry = classify(p, EntryLane(5), expert_of(p, load.id));
  r.entry.same &= __ballot_sync(~0u, r.entry.valid);
  r.destination = 0;
  const uint32_t owner = r.entry.owner;
  const uint32_t turn = owner > g.rank ? owner - g.rank - 1 : owner + g.num_ranks - g.rank - 1;
#pragma unroll 1
  for (uint32_t base = 0; base < g.num_ranks; base += 32) {
    const uint32_t at = turn - base;
    const uint32_t taken = __reduce_or_sync(~0u, r.entry.leads && at < 32 ? 1u << at : 0);
    r.destination += __popc(turn < base ? 0 : at < 32 ? taken & ((1u << at) - 1) : taken);
  }
  return r;
}

// Where the lane's entry of a token goes, and what is known of it before it is counted.
struct Target {
  bool sent;           // by this block
  uint64_t rows;       // this rank's at the owner, or 0
  uint64_t* row_base;  // of the destination
  uint64_t* entry;     // of its header
  uint64_t value;      // the entry, but for its position
};

// Begins to route one token, at `place`. The senders find the chunk's destinations side by side.
// One warp.
template <class P>
__device__ __forceinline__ Target find_target(const P& p, const Shared& s, const Chunk& chunk,
                                              uint64_t epoch, uint32_t token, uint32_t place,
                                              const Routed& r) {
  const ep_group& g = p.a.group;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t top_k = p.a.handle.top_k;
  const uint32_t max_destinations = Shared::max_destinations(g, top_k);
  const Entry& entry = r.entry;
  const uint32_t owner = entry.valid ? entry.owner : 0;
  const uint64_t partner = shared_at<uint64_t>(s.partners)[owner];
  const uint32_t at = p.plan.blocks_per_token.quotient(r.destination);
  const bool sent = r.destination - at * chunk.stride == chunk.first;
  uint64_t* row_base = shared_at<uint64_t>(s.row_base) + place * max_destinations;
  uint64_t* header = shared_at<uint64_t>(s.header) + (place * max_destinations + at) * (1 + top_k);
  arch::st_shared_u64_if(sent && entry.leads, header,
                         uint64_t{static_cast<uint32_t>(__popc(entry.same))} << 32 | token);
  arch::st_shared_u64_if(lane < max_destinations, row_base + lane, 0);
  return {sent, partner == 0 ? 0 : p.rows_at(partner, g.rank, epoch), row_base + at,
          header + 1 + __popc(entry.same & ((1u << lane) - 1)),
          uint64_t{__float_as_uint(r.weight)} << 32 | lane << 11 |
              (entry.expert - owner * p.plan.local_experts.value)};
}

// Routes one token: slots, positions and headers, left for the senders. One warp. Returns what
// combine has to know of the lane's entry.
template <class P>
__device__ __forceinline__ uint32_t route_token(const P& p, const Shared& s, const Routed& r,
                                                const Target& to) {
  const Entry& entry = r.entry;
  const uint32_t owner = entry.valid ? entry.owner : 0;
  uint32_t* rank_rows = shared_at<uint32_t>(s.rank_rows) + owner;
  uint32_t* expert_rows = shared_at<uint32_t>(s.expert_rows) + entry.expert;
  const uint32_t slot = *rank_rows;
  const uint32_t position = arch::ld_shared_u32_if(entry.valid, expert_rows);
  __syncwarp();  // all lanes of an owner have read its rows before one counts on
  arch::st_shared_u32_if(entry.leads, rank_rows, slot + 1);
  arch::st_shared_u32_if(entry.valid, expert_rows, position + 1);
  __syncwarp();  // other lanes read them for the next token
  arch::st_shared_u64_if(to.sent && entry.valid, to.entry, to.value | position << 16);
  arch::st_shared_u64_if(to.sent && entry.leads, to.row_base,
                         to.rows == 0 ? 0 : to.rows + slot * p.a.layout.row_stride);
  return entry.valid && to.rows != 0 ? owner << 16 | slot : kNowhere;
}

// What the router leaves in memory: off the path of the senders.
template <class P>
__device__ __forceinline__ void keep_route(const P& p, uint64_t epoch, uint32_t token,
                                           const Routed& r, uint32_t route) {
  const ep_group& g = p.a.group;
  const Entry& entry = r.entry;
  const uint32_t lane = threadIdx.x % 32;
  if (lane >= p.a.handle.top_k) return;
  reinterpret_cast<uint32_t*>(p.a.handle.route)[uint64_t{token} * g.max_top_k + lane] = route;
  if (route != kNowhere) return;
  if (!entry.valid && r.id != -1) [[unlikely]]
    record_fault(g, kDispatchSend, epoch,
                 entry.expert == kNowhere ? EP_FAULT_EXPERT_RANGE : EP_FAULT_EXPERT_REPEATED,
                 EP_PHASE_SEND, g.rank, token, r.id);
  if (entry.leads && peer_base(g, entry.owner) == 0) [[unlikely]]
    record_peer_fault(g, kDispatchSend, epoch, EP_FAULT_UNREACHABLE, EP_PHASE_SEND, entry.owner,
                      token, 0);
}

// The router's task.
template <class P>
__device__ __forceinline__ void route(const P& p, const Shared& s, const Chunk& chunk,
                                      RouterLoad next) {
  if (chunk.size() == 0) return;
  Fixed* fixed = shared_at<Fixed>(s.fixed);
  Routed routed = order_entries(p, next);
  await(&fixed->known, 0);
  const uint64_t epoch = fixed->send_epoch;
#pragma unroll 1
  for (uint32_t i = 0; i < chunk.size(); ++i) {
    const uint32_t token = chunk.from + i;
    const uint32_t place = i % kPlaces;
    if (i >= kPlaces) await(&fixed->sent[place], i / kPlaces - 1);
    const Target target = find_target(p, s, chunk, epoch, token, place, routed);
    if (i == 0) await(&fixed->counted, 0);
    const uint32_t kept = route_token(p, s, routed, target);
    arch::mbarrier_arrive_release_cta(&fixed->routed[place]);
    next = RouterLoad(p, chunk, token + 1);
    // Of the blocks that share a token, one keeps its route.
    if (chunk.first == 0) keep_route(p, epoch, token, routed, kept);
    if (i + 1 < chunk.size()) routed = order_entries(p, next);
  }
}

}  // namespace
}  // namespace ep
