// Dispatch: every token once to each rank that owns one of its experts, spread there over the
// experts.
//
// Warps of a block have one task each; what other blocks of this rank send is waited for like what
// other ranks send:
//   senders   quantise, and store whole lines to the peers;
//   a router  gives each token its slots, so that the same input gives the same bits: a slot is a
//             prefix sum in token order;
//   readers   poll all sources' counts and sum them to where each source's rows begin;
//   placers   count the entries before the block's tokens, then take rows' lines as they arrive and
//             copy them to the rows' experts; so does every warp that has done its own task.
// The last block tells every rank its counts.
//
// What a multiprocessor loads waits behind what it has stored to peers, for as long as the links
// take for that. So where it was measured to be faster (Division), the first blocks only send,
// each of them a few tokens in turn, and the others only place: rows then arrive one after the
// other, are found at once, and are copied while the next ones are on the wire. Elsewhere all
// blocks do both.
//
// With few tokens the time is that of dependent instructions, of which a warp does one in about ten
// cycles, while the block's other warps take the issue slots in between. So each task is one
// stretch of code without divergent branches, has done all that it can before it waits, and waits
// only for what it needs; and a warp that has nothing to do sleeps at a barrier, it does not poll.

#include <cuda_bf16.h>

#include "arch/fp8.cuh"
#include "arch/mbarrier.cuh"
#include "arch/predicated.cuh"
#include "arch/shared.cuh"
#include "divisor.cuh"
#include "group.cuh"
#include "launch.cuh"
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
constexpr uint32_t kCopies = 4;        // of a row, likewise
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

// The ids that a lane has at a time: all of one token's where these are few, else one.
struct TokenIds {
  static constexpr uint32_t kMost = 8;
  int64_t id[kMost];
};

// Whether a lane counts whole tokens. It then knows by itself which entries repeat others, without
// looking at other lanes'.
__host__ __device__ __forceinline__ bool lanes_count_tokens(const ep_group& g, uint32_t top_k) {
  return top_k <= TokenIds::kMost && g.num_ranks <= 32;
}

// A row's scales, in 4-byte words.
__host__ __device__ constexpr uint32_t scale_words_of(uint32_t hidden, bool fp8, bool ue8m0) {
  return !fp8 ? 0 : ue8m0 ? div_up(hidden, 4 * kChannelsPerScale) : hidden / kChannelsPerScale;
}

__host__ __device__ constexpr RowShape row_shape(uint32_t hidden, bool fp8, bool ue8m0) {
  return {hidden / (fp8 ? 16 : 8), div_up(scale_words_of(hidden, fp8, ue8m0), 2)};
}

// Hidden sizes that a kernel of their own knows at compile time.
constexpr bool has_own_kernel(uint32_t hidden) { return hidden == 3584 || hidden == 7168; }

// Which blocks send, which place, and in which way. Each limit lies between a value with which a
// divided dispatch was measured to be faster, on 2 GPUs, and one with which it was not
// (docs/performance.md). To send a token takes a block about as long whatever its hidden size is,
// so the smaller rows are, the more blocks it takes to keep the links busy.
struct Division {
  uint32_t blocks;
  bool few_tokens;  // the way
  uint32_t tokens_per_block;
  uint32_t blocks_per_token;  // more than 1 where blocks share a token's destinations
  uint32_t first_placing;     // 0: those that send, too

  Division(const ep_dispatch_args& a, uint32_t grid) : blocks(grid), first_placing(0) {
    constexpr uint32_t kParts = EP_DISPATCH_SEND | EP_DISPATCH_RECV;
    constexpr uint32_t kManyBlocks = 112;  // faster with 132, not with 96
    constexpr uint32_t kMostTokens = 8;    // a block: with 1024 in all, not with 2048
    constexpr uint32_t kMostCopies = 6;    // of a row: with 4, not with 8
    // With more tokens than blocks:
    constexpr uint32_t kLargeRow = 6144;    // bytes: with 7168 and 14336, not with 5120
    constexpr uint32_t kMostHidden = 7168;  // not with 8192, which is quantised in two steps
    // With fewer:
    constexpr uint32_t kSmallRow = 4608;  // bytes: half send with 4096, a third with 5120
    const uint32_t tokens = a.handle.num_tokens;
    const uint32_t top_k = a.handle.top_k;
    const uint32_t hidden = a.group.hidden;
    const uint32_t row_bytes = hidden * ((a.flags & EP_DISPATCH_FP8) != 0 ? 1 : 2);
    const bool both = (a.flags & kParts) == kParts;
    const bool worth_it = tokens <= grid || (row_bytes >= kLargeRow && hidden <= kMostHidden);
    const bool divide =
        both && (2 * tokens <= grid || (grid >= kManyBlocks && tokens <= kMostTokens * grid &&
                                        top_k <= kMostCopies * a.group.num_ranks && worth_it));
    const bool few = tokens <= grid && lanes_count_tokens(a.group, top_k);
    few_tokens = few && (divide || !both);
    const uint32_t share = !few ? 3 : row_bytes < kSmallRow ? 2 : has_own_kernel(hidden) ? 4 : 3;
    const uint32_t senders = divide ? div_up(grid, share) : grid;
    tokens_per_block = div_up(tokens, senders);
    blocks_per_token = 1;
    // One multiprocessor alone stores far slower than the links.
    if (tokens != 0 && 2 * tokens <= senders) {
      const uint32_t d = most_destinations(a.group, top_k);
      blocks_per_token = senders / tokens < d ? senders / tokens : d;
    }
    if (divide && tokens != 0) first_placing = div_up(tokens, tokens_per_block) * blocks_per_token;
  }
  uint32_t placing() const { return blocks - first_placing; }
};

// What the host works out once for all blocks.
struct Plan {
  Shared shared;
  Divisor local_experts;
  Divisor packets_per_source;
  Divisor blocks_per_token;
  uint32_t tokens_per_block;
  uint32_t first_placing;
  uint32_t placing_blocks;
  uint32_t entry_shift;  // log2 of the lanes that look at one token's entries
  bool whole_tokens;     // a placer's lane counts whole tokens
  uint32_t likely_units;
  uint32_t last_block;
  Plan(const ep_dispatch_args& a, bool fp8, uint32_t unit_lines, const Division& d)
      : shared(a.group, a.handle.top_k, a.group.hidden, fp8),
        local_experts(a.group.num_experts / a.group.num_ranks),
        packets_per_source(local_experts.value + 1), blocks_per_token(d.blocks_per_token),
        tokens_per_block(d.tokens_per_block), first_placing(d.first_placing),
        placing_blocks(d.placing()), entry_shift(0),
        whole_tokens(lanes_count_tokens(a.group, a.handle.top_k)),
        likely_units(likely_units_of(a, fp8, unit_lines, d.placing())), last_block(d.blocks - 1) {
    while ((1u << entry_shift) < a.handle.top_k) ++entry_shift;
  }

  // Units of placing that a block has if all ranks have this rank's number of tokens.
  static uint32_t likely_units_of(const ep_dispatch_args& a, bool fp8, uint32_t unit_lines,
                                  uint32_t blocks) {
    const bool ue8m0 = (a.flags & EP_DISPATCH_UE8M0) != 0;
    const uint32_t per_row = div_up(row_shape(a.group.hidden, fp8, ue8m0).lines(), unit_lines);
    const uint64_t units = uint64_t{a.handle.num_tokens} * a.group.num_ranks * per_row;
    return static_cast<uint32_t>((units + blocks - 1) / blocks);
  }
};

// What all tasks derive from the arguments. H is the hidden size where it is known at compile time.
template <uint32_t H, bool FP8, class W>
struct Problem : W {
  static constexpr bool kFp8 = FP8;
  const ep_dispatch_args& a;
  const Plan& plan;

  __device__ __forceinline__ Problem(const ep_dispatch_args& args, const Plan& p)
      : a(args), plan(p) {}

  __device__ __forceinline__ uint32_t hidden() const { return H != 0 ? H : a.group.hidden; }
  __device__ __forceinline__ bool ue8m0() const {
    return FP8 && (a.flags & EP_DISPATCH_UE8M0) != 0;
  }
  __device__ __forceinline__ uint32_t scale_words() const {
    return scale_words_of(hidden(), FP8, ue8m0());
  }
  __device__ __forceinline__ RowShape row() const { return row_shape(hidden(), FP8, ue8m0()); }
  __device__ __forceinline__ uint32_t row_bytes() const { return hidden() * (FP8 ? 1 : 2); }
  // All rows together are fewer than 2^31 (ep_layout's maker checks it).
  __device__ __forceinline__ uint32_t rows_per_expert() const {
    return a.group.num_ranks * a.group.max_tokens;
  }
  __device__ __forceinline__ uint32_t ring_index(uint64_t epoch) const {
    return static_cast<uint32_t>(epoch) & (a.layout.ring - 1);
  }
  // Where `source`'s part of this epoch's counts and rows stands in the buffer at `base`.
  __device__ __forceinline__ uint64_t counts_at(uint64_t base, uint32_t source,
                                                uint64_t epoch) const {
    return base + a.layout.counts + ring_index(epoch) * a.layout.counts_ring_stride +
           source * a.layout.counts_source_stride;
  }
  __device__ __forceinline__ uint64_t rows_at(uint64_t base, uint32_t source,
                                              uint64_t epoch) const {
    return base + a.layout.rows + ring_index(epoch) * a.layout.rows_ring_stride +
           source * a.layout.rows_source_stride;
  }
};

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

// What a block sends: tokens [from, to), and of their destinations every `stride`th from `first`
// on.
struct Chunk {
  uint32_t from;
  uint32_t to;
  uint32_t first;
  uint32_t stride;
  template <class P>
  __device__ __forceinline__ explicit Chunk(const P& p) : stride(p.plan.blocks_per_token.value) {
    const uint32_t token = p.plan.blocks_per_token.quotient(blockIdx.x);
    first = blockIdx.x - token * stride;
    from = min(token * p.plan.tokens_per_block, p.a.handle.num_tokens);
    to = min(from + p.plan.tokens_per_block, p.a.handle.num_tokens);
  }
  __device__ __forceinline__ uint32_t size() const { return to - from; }
};

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

// The scale of a block of channels, and its inverse as it is stored.
struct Scale {
  float multiply;
  float inverse;
};

__device__ __forceinline__ Scale scale_of(float amax, bool pow2) {
  amax = fmaxf(amax, 1e-4f);
  if (!pow2) return {448.0f / amax, amax * (1.0f / 448.0f)};
  // Up to the next power of two: the exponent alone, one more if any mantissa bit is set.
  const uint32_t bits = __float_as_uint(amax * (1.0f / 448.0f));
  const uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);
  const float inverse = __uint_as_float(exponent << 23);
  return {__frcp_rn(inverse), inverse};
}

__device__ __forceinline__ __nv_bfloat162 bf16x2(uint32_t v) {
  return *reinterpret_cast<const __nv_bfloat162*>(&v);
}

__device__ __forceinline__ float2 bf16x2_to_float2(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}

// Sixteen channels of a token.
struct Group16 {
  uint4 half[2];
};

template <class P>
__device__ __forceinline__ Group16 load_group(const P& p, uint32_t token, uint32_t group) {
  const uint8_t* x =
      reinterpret_cast<const uint8_t*>(p.a.x) + uint64_t{token} * p.hidden() * 2 + 32 * group;
  if (group >= p.hidden() / 16) return {};
  return {arch::ld_stream_v4(x), arch::ld_stream_v4(x + 16)};
}

// Quantises a token into shared memory, at `place`. A sender has 16 channels at a time, eight share
// a scale; `first` is load_group of the thread's first group.
template <class P>
__device__ __forceinline__ void quantise(const P& p, const Shared& s, uint32_t token,
                                         uint32_t place, Group16 first) {
  uint32_t* scales = shared_at<uint32_t>(s.rows + place * Shared::quantised_bytes(p.hidden()));
  uint8_t* body = reinterpret_cast<uint8_t*>(scales) + Shared::scale_bytes(p.hidden());
  const uint32_t groups = p.hidden() / 16;
  const bool pow2 = (p.a.flags & EP_DISPATCH_POW2) != 0;
  for (uint32_t base = 0; base < groups; base += kSenders) {
    const uint32_t i = base + threadIdx.x;
    const Group16 in = base == 0 ? first : load_group(p, token, i);
    const uint32_t word[8] = {in.half[0].x, in.half[0].y, in.half[0].z, in.half[0].w,
                              in.half[1].x, in.half[1].y, in.half[1].z, in.half[1].w};
    // Largest magnitudes of even and of odd channels, side by side.
    __nv_bfloat162 most = {};
#pragma unroll
    for (uint32_t w : word) most = __hmax2(most, __habs2(bf16x2(w)));
#pragma unroll
    for (int mask = 4; mask != 0; mask /= 2) most = __hmax2(most, __shfl_xor_sync(~0u, most, mask));
    const float amax = fmaxf(__low2float(most), __high2float(most));
    const Scale scale = scale_of(amax, pow2);
    uint32_t q[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 lo = bf16x2_to_float2(word[2 * w]);
      const float2 hi = bf16x2_to_float2(word[2 * w + 1]);
      q[w] = arch::cvt_e4m3x2_rn_satfinite(lo.x * scale.multiply, lo.y * scale.multiply) |
             arch::cvt_e4m3x2_rn_satfinite(hi.x * scale.multiply, hi.y * scale.multiply) << 16;
    }
    arch::st_shared_v4_if(i < groups, body + 16 * i, {q[0], q[1], q[2], q[3]});
    const bool has_scale = i < groups && i % 8 == 0;
    const uint32_t inverse = __float_as_uint(scale.inverse);
    arch::st_shared_u8_if(has_scale && p.ue8m0(), reinterpret_cast<uint8_t*>(scales) + i / 8,
                          inverse >> 23);
    arch::st_shared_u32_if(has_scale && !p.ue8m0(), scales + i / 8, inverse);
  }
}

// A token's row on its way: the first pieces of lines are loaded before it is known where they go.
template <bool FP8>
struct Sending {
  static constexpr uint32_t kStep = kSenderWarps * kLinesPerWarp;
  static constexpr uint32_t kAhead = FP8 ? 2 : 3;
  // Where the lane's pieces stand in any row as it is kept. All lanes load 16 bytes: for a piece of
  // 8 those that contain it, for one that the row does not have the row's last.
  uint32_t from[kAhead];
  uint32_t upper;  // bit n: piece n is the upper half
  uint4 piece[kAhead];

  static __device__ __forceinline__ uint32_t first_line() {
    return threadIdx.x / 32 * kLinesPerWarp;
  }
  // Works these out for the lines from `first` on.
  template <class P>
  __device__ __forceinline__ void aim(const P& p, uint32_t first) {
    const LaneInLine lane;
    const RowShape shape = p.row();
    const uint32_t body = FP8 ? Shared::scale_bytes(p.hidden()) : 0;
    upper = 0;
#pragma unroll
    for (uint32_t n = 0; n < kAhead; ++n) {
      const uint32_t line = first + n * kStep + lane.line;
      const uint32_t half =
          line < shape.scales ? 8 * line : body + 16 * shape.whole() + 8 * (line - shape.scales);
      const uint32_t at = lane.last() ? half : body + 16 * (7 * line + lane.piece);
      from[n] = min(at & ~15u, body + p.row_bytes() - 16);
      upper |= (at >> 3 & 1) << n;
    }
  }
  template <class P>
  __device__ __forceinline__ void load(const P& p, const Shared& s, uint32_t token,
                                       uint32_t place) {
    const uint8_t* row =
        FP8 ? shared_at<uint8_t>(s.rows + place * Shared::quantised_bytes(p.hidden()))
            : reinterpret_cast<const uint8_t*>(p.a.x) + uint64_t{token} * p.row_bytes();
#pragma unroll
    for (uint32_t n = 0; n < kAhead; ++n)
      piece[n] =
          FP8 ? *reinterpret_cast<const uint4*>(row + from[n]) : arch::ld_stream_v4(row + from[n]);
  }
  // Stores the token, which is routed, to its destinations; its first pieces are loaded.
  template <class P>
  __device__ __forceinline__ void store(const P& p, const Shared& s, uint32_t token,
                                        uint32_t place) {
    const LaneInLine lane;
    const uint32_t top_k = p.a.handle.top_k;
    const uint32_t max_destinations = Shared::max_destinations(p.a.group, top_k);
    const uint32_t header_lines = p.a.layout.header_lines;
    const uint32_t offset = lane.line * kLine + lane.piece * 16;
    const uint32_t lines = p.row().lines();
    const uint64_t* row_base = shared_at<uint64_t>(s.row_base) + place * max_destinations;
    const uint64_t epoch = shared_at<Fixed>(s.fixed)->send_epoch;
    // Headers first: nothing of a row can be placed before. The last warps have the fewest lines.
    const uint32_t turn = kSenderWarps - 1 - threadIdx.x / 32;
#pragma unroll 1
    for (uint32_t d = turn; d < max_destinations; d += kSenderWarps) {
      const uint64_t* header =
          shared_at<uint64_t>(s.header) + (place * max_destinations + d) * (1 + top_k);
      if (row_base[d] == 0) continue;
      const uint32_t entries = static_cast<uint32_t>(header[0] >> 32);
      const uint32_t unit = lane.line * 15 + lane.piece * 2;
      const uint64_t lo = arch::ld_shared_u64_if(unit <= entries, header + unit);
      const uint64_t hi = arch::ld_shared_u64_if(unit + 1 <= entries, header + unit + 1);
      const uint2 half = {static_cast<uint32_t>(lo), static_cast<uint32_t>(lo >> 32)};
      const uint4 v = lane.last() ? seal(half, epoch)
                                  : uint4{half.x, half.y, static_cast<uint32_t>(hi),
                                          static_cast<uint32_t>(hi >> 32)};
      __syncwarp();
      arch::st_relaxed_sys_v4_if(lane.line < header_lines,
                                 reinterpret_cast<uint8_t*>(row_base[d]) + offset, v);
    }
#pragma unroll 1
    for (uint32_t first = first_line(); first < lines; first += kAhead * kStep) {
      if (first != first_line()) {
        aim(p, first);
        load(p, s, token, place);
      }
#pragma unroll
      for (uint32_t n = 0; n < kAhead; ++n) {
        const uint4 v = piece[n];
        if (lane.last())
          piece[n] = seal((upper >> n & 1) != 0 ? uint2{v.z, v.w} : uint2{v.x, v.y}, epoch);
      }
#pragma unroll 1
      for (uint32_t d = 0; d < max_destinations; d += kDestinations) {
        uint64_t row[kDestinations];
#pragma unroll
        for (uint32_t n = 0; n < kDestinations; ++n) row[n] = row_base[d + n];
        __syncwarp();  // the lanes of a line store together
#pragma unroll
        for (uint32_t n = 0; n < kDestinations; ++n) {
          uint8_t* to =
              reinterpret_cast<uint8_t*>(row[n]) + (header_lines + first) * kLine + offset;
#pragma unroll
          for (uint32_t m = 0; m < kAhead; ++m)
            arch::st_relaxed_sys_v4_if(row[n] != 0 && first + m * kStep + lane.line < lines,
                                       to + m * kStep * kLine, piece[m]);
        }
      }
    }
    if (lines > kAhead * kStep) aim(p, first_line());  // for the next token
  }
};

// Clears shared memory from one offset to another, both multiples of 16. All placers.
template <class P>
__device__ __forceinline__ void clear(uint32_t from, uint32_t to) {
#pragma unroll 1
  for (uint32_t i = from + 16 * placer(); i < to; i += 16 * P::kPlacers) *shared_at<uint4>(i) = {};
}

// Waits for the `n`th completion of a barrier, counted from 0. One warp.
__device__ __forceinline__ void await(const uint64_t* barrier, uint32_t n) {
  arch::mbarrier_wait_acquire_cta(barrier, n & 1);
  __syncwarp();
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

// The senders' task. Of FP8, `x` is the thread's load_group of the first token.
template <class P>
__device__ __forceinline__ void send(const P& p, const Shared& s, const Chunk& chunk, Group16 x) {
  Fixed* fixed = shared_at<Fixed>(s.fixed);
  Sending<P::kFp8> row;
  row.aim(p, row.first_line());
#pragma unroll 1
  for (uint32_t i = 0; i < chunk.size(); ++i) {
    const uint32_t token = chunk.from + i;
    const uint32_t place = i % kPlaces;
    if (P::kFp8) {
      quantise(p, s, token, place, x);
      if (i + 1 < chunk.size()) x = load_group(p, token + 1, threadIdx.x);
      // Behind it the place before is free too: everybody has read what it needed there.
      arch::bar_sync(kSendBarrier, kSenders);
    }
    row.load(p, s, token, place);
    await(&fixed->routed[place], i / kPlaces);
    row.store(p, s, token, place);
    arch::mbarrier_arrive_release_cta(&fixed->sent[place]);
  }
}

// Where a packet of the counts goes: packet 0 of a source tells its rows, the others its tokens for
// each local expert.
struct Packet {
  uint32_t source;
  uint32_t at;
  template <class P>
  __device__ __forceinline__ Packet(const P& p, uint32_t i)
      : source(p.plan.packets_per_source.quotient(i)),
        at(i - source * p.plan.packets_per_source.value) {}
  // From where counts begin; all of them are far smaller than 4 GiB.
  template <class P>
  __device__ __forceinline__ uint32_t offset(const P& p) const {
    return source * static_cast<uint32_t>(p.a.layout.counts_source_stride) +
           at * static_cast<uint32_t>(sizeof(uint64_t));
  }
  // Where in shared memory its value is kept.
  template <class P>
  __device__ __forceinline__ uint32_t* value(const P& p, const Shared& s) const {
    return at == 0
               ? shared_at<uint32_t>(s.source_rows) + source
               : shared_at<uint32_t>(s.begin) + (at - 1) * (p.a.group.num_ranks + 1) + source + 1;
  }
};

// `came`: which of a reader's packets from `base` on have come, or will not. The time waited
// for a source is that of its first packet.
template <class P>
__device__ __forceinline__ void add_waits(const P& p, uint32_t base, uint32_t came,
                                          uint64_t waited) {
  int64_t* wait = reinterpret_cast<int64_t*>(p.a.wait_ns);
#pragma unroll 1
  for (; came != 0; came &= came - 1) {
    const Packet packet(p, base + P::kReaders * (__ffs(came) - 1));
    if (packet.at == 0) wait[packet.source] += static_cast<int64_t>(waited);
  }
}

// Takes all of a source's counts, or none of them, as all blocks do: when the operation's time is
// over, here or in another block. What is missing stands in shared memory as kNowhere. All readers.
template <class P>
__device__ __forceinline__ void settle_counts(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const uint64_t* partners = shared_at<uint64_t>(s.partners);
  const uint32_t n = p.plan.packets_per_source.value;
#pragma unroll 1
  for (uint32_t r = threadIdx.x - 32 * P::kFirstReader; r < g.num_ranks; r += P::kReaders) {
    if (partners[r] == 0) continue;
    const uint64_t* packets =
        reinterpret_cast<const uint64_t*>(p.counts_at(partners[g.rank], r, epoch));
    bool here = decide_present(g, kDispatchRecv, epoch, r, packets, n);
#pragma unroll 1
    for (uint32_t at = 0; here && at < n; ++at) {
      uint32_t* value = Packet(p, r * n + at).value(p, s);
      if (*value != kNowhere) continue;
      const uint64_t packet = arch::ld_acquire_sys_u64(packets + at);
      // Other blocks have seen it; meanwhile a later dispatch may have overwritten it.
      here = packet_is(packet, epoch);
      *value = min(static_cast<uint32_t>(packet), g.max_tokens);
    }
    if (here) continue;
    report_timeout(g, kDispatchRecv, epoch, EP_PHASE_COUNTS, r);
#pragma unroll 1
    for (uint32_t at = 0; at < n; ++at) *Packet(p, r * n + at).value(p, s) = 0;
  }
  arch::bar_sync(kReadBarrier, P::kReaders);
}

// The readers' task: where each source's rows begin.
template <class P>
__device__ __forceinline__ void read_counts(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const Control control(g);
  const uint32_t thread = threadIdx.x - 32 * P::kFirstReader;
  const uint64_t* partners = shared_at<uint64_t>(s.partners);
  uint32_t* begin = shared_at<uint32_t>(s.begin);
  const uint32_t* source_rows = shared_at<uint32_t>(s.source_rows);
  const uint8_t* own = reinterpret_cast<const uint8_t*>(p.counts_at(partners[g.rank], 0, epoch));
  constexpr uint32_t kInFlight = 3;
  const uint32_t packets = g.num_ranks * p.plan.packets_per_source.value;
  // One block times the sources.
  const bool timed = p.a.wait_ns != 0 && blockIdx.x == p.plan.first_placing;
  const uint64_t began = timed ? arch::globaltimer_ns() : 0;
  bool over = false;   // the operation's time, here or in another block
  bool doubt = false;  // whether what has come may be taken at face value
#pragma unroll 1
  for (uint32_t base = thread; base < packets; base += P::kReaders * kInFlight) {
    uint32_t from[kInFlight];  // offsets of packets
    uint32_t* to[kInFlight];
    uint32_t missing = 0;
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; ++j) {
      const uint32_t i = base + P::kReaders * j;
      // A packet beyond the last is read like the first, in vain.
      const Packet packet(p, i < packets ? i : base);
      from[j] = packet.offset(p);
      to[j] = packet.value(p, s);
      if (i < packets && partners[packet.source] != 0) missing |= 1u << j;
    }
    uint32_t value[kInFlight] = {};
    uint32_t lost = 0;
    Patience patience;
    while (missing != 0) {
      uint64_t seen[kInFlight];
#pragma unroll
      for (uint32_t j = 0; j < kInFlight; ++j) seen[j] = arch::ld_relaxed_sys_u64(own + from[j]);
      // Read beside the last packets, the verdict covers all of them.
      const uint64_t verdict = arch::ld_relaxed_gpu_u64(control.any_verdict(kDispatchRecv));
      const uint32_t before = missing;
#pragma unroll
      for (uint32_t j = 0; j < kInFlight; ++j) {
        if ((missing >> j & 1) != 0 && packet_is(seen[j], epoch)) {
          value[j] = static_cast<uint32_t>(seen[j]);
          missing &= ~(1u << j);
        }
      }
      over |= !is_open(verdict, epoch);
      if (missing != 0) {
#pragma unroll
        for (uint32_t j = 0; j < kInFlight; ++j)
          if ((missing >> j & 1) != 0 && packet_has_passed(seen[j], epoch)) lost |= 1u << j;
        over |= patience.expired(g, kDispatchRecv, epoch);
        if (over) lost |= missing;
        missing &= ~lost;
      }
      if (timed) [[unlikely]]
        add_waits(p, base, before & ~missing, arch::globaltimer_ns() - began);
    }
    doubt |= over || lost != 0;
    // No source can send more; a wrong value must not lead out of the output.
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; ++j)
      arch::st_shared_u32_if(base + P::kReaders * j < packets, to[j], min(value[j], g.max_tokens));
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; ++j) arch::st_shared_u32_if(lost >> j & 1, to[j], kNowhere);
  }
  if (arch::bar_or(kReadBarrier, P::kReaders, doubt)) [[unlikely]]
    settle_counts(p, s, epoch);
#pragma unroll 1
  for (uint32_t l = thread; l < p.plan.local_experts.value; l += P::kReaders) {
    uint32_t* row = begin + l * (g.num_ranks + 1);
    uint32_t sum = 0;
    row[0] = 0;
    constexpr uint32_t kAtOnce = 4;
#pragma unroll 1
    for (uint32_t r = 1; r <= g.num_ranks; r += kAtOnce) {
      uint32_t count[kAtOnce];
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; ++j) count[j] = r + j <= g.num_ranks ? row[r + j] : 0;
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; ++j)
        if (r + j <= g.num_ranks) row[r + j] = sum += count[j];
    }
  }
  // The last warp most often has no expert.
  if (thread >= P::kReaders - 32) {
    uint32_t most = 0;
#pragma unroll 1
    for (uint32_t r = thread % 32; r < g.num_ranks; r += 32) most = max(most, source_rows[r]);
    most = __reduce_max_sync(~0u, most);
    if (thread % 32 == 0) shared_at<Fixed>(s.fixed)->most_rows = most;
  }
  arch::mbarrier_arrive_release_cta(&shared_at<Fixed>(s.fixed)->placeable);
}

// What give_up_sources leaves in place of a source's rows. If it comes before write_counts, that
// finds this mark where it puts their number.
__device__ __forceinline__ uint32_t given_up_mark(uint64_t epoch) {
  return EP_ROWS_GIVEN_UP | static_cast<uint32_t>(epoch);
}

// What does not depend on rows. The readers of one block write it.
template <class P>
__device__ __forceinline__ void write_counts(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x - 32 * P::kFirstReader;
  const uint32_t* begin = shared_at<uint32_t>(s.begin);
  int32_t* count = reinterpret_cast<int32_t*>(p.a.recv_count);
  int64_t* total = reinterpret_cast<int64_t*>(p.a.total_count);
  int64_t* range = reinterpret_cast<int64_t*>(p.a.layout_range);
  uint32_t* recv_rows = reinterpret_cast<uint32_t*>(p.a.handle.recv_rows);
  await(&shared_at<Fixed>(s.fixed)->placeable, 0);
#pragma unroll 1
  for (uint32_t l = thread; l < p.plan.local_experts.value; l += P::kReaders) {
    const uint32_t* at = begin + l * (g.num_ranks + 1);
#pragma unroll 1
    for (uint32_t r = 0; r < g.num_ranks; ++r)
      range[l * g.num_ranks + r] =
          static_cast<int64_t>(uint64_t{at[r]} << 32 | (at[r + 1] - at[r]));
    count[l] = static_cast<int32_t>(at[g.num_ranks]);
    if (total != nullptr) total[l] += at[g.num_ranks];
  }
#pragma unroll 1
  for (uint32_t r = thread; r < g.num_ranks; r += P::kReaders) {
    const uint32_t rows = shared_at<uint32_t>(s.source_rows)[r];
    if (arch::atom_exch_relaxed_gpu_u32(recv_rows + r, rows) == given_up_mark(epoch)) [[unlikely]]
      recv_rows[r] = 0;
  }
}

// What all tasks need of the control block. One warp.
struct ControlLoad {
  uint64_t epoch = 0;    // lane 0: of the send part, lane 1: of the receive part
  uint64_t partner = 0;  // the lane's rank
  uint32_t active = 0;

  __device__ __forceinline__ ControlLoad() {}
  __device__ __forceinline__ ControlLoad(const ep_group& g, const Control& control) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < g.num_ranks) {
      partner = peer_base(g, lane);
      active = control.active(lane);
    }
    if (lane < 2) epoch = epoch_of(control, lane == 0 ? kDispatchSend : kDispatchRecv);
  }
  template <class P>
  __device__ __forceinline__ void keep(const P& p, const Shared& s, const Control& control) const {
    const ep_group& g = p.a.group;
    const uint32_t lane = threadIdx.x % 32;
    Fixed* fixed = shared_at<Fixed>(s.fixed);
    uint64_t* partners = shared_at<uint64_t>(s.partners);
    if (lane == 0) fixed->send_epoch = epoch;
    if (lane == 1) fixed->recv_epoch = epoch;
    if (lane < g.num_ranks) partners[lane] = active != 0 ? partner : 0;
#pragma unroll 1
    for (uint32_t r = 32 + lane; r < g.num_ranks; r += 32)
      partners[r] = partner_base(g, control, r);
    arch::mbarrier_arrive_release_cta(&fixed->known);
  }
};

// Whether the readers are done.
__device__ __forceinline__ bool placeable(const Shared& s) {
  return arch::mbarrier_test_acquire_cta(&shared_at<Fixed>(s.fixed)->placeable, 0);
}

// A row's header as a warp reads it, each line by one instruction: of the first two lane i has the
// i-th 8 bytes, and of a third those of lanes below 16.
struct Header {
  uint2 unit = {};
  uint2 third = {};

  __device__ __forceinline__ void load(const uint8_t* row, uint32_t lines) {
    const uint32_t lane = threadIdx.x % 32;
    const uint8_t* from = row + 8 * lane;
    if (lane < 16 * lines) unit = arch::ld_relaxed_sys_v2(from);
    if (lines > 2 && lane < 16) [[unlikely]]
      third = arch::ld_relaxed_sys_v2(from + 2 * kLine);
  }
  // Whether what this lane has does not stand against the lines' being complete.
  __device__ __forceinline__ bool is_whole(uint32_t lines, uint64_t epoch) const {
    const uint32_t lane = threadIdx.x % 32;
    const uint2 seal = {static_cast<uint32_t>(epoch), static_cast<uint32_t>(epoch >> 32)};
    if (lane % 16 != 15 || lane >= 16 * lines) return true;
    return unit.x == seal.x && unit.y == seal.y &&
           (lines <= 2 || lane != 15 || (third.x == seal.x && third.y == seal.y));
  }
  __device__ __forceinline__ uint32_t token() const { return __shfl_sync(~0u, unit.x, 0); }
  __device__ __forceinline__ uint32_t entries() const { return __shfl_sync(~0u, unit.y, 0); }
  // Lane e's: entry e. There are 15 units in a line's 16 times 8 bytes.
  __device__ __forceinline__ uint2 entry(uint32_t lines) const {
    const uint32_t at = 1 + threadIdx.x % 32;
    const uint32_t holder = at + at / 15;
    uint2 e = {__shfl_sync(~0u, unit.x, holder), __shfl_sync(~0u, unit.y, holder)};
    if (lines > 2) [[unlikely]] {
      const uint2 far = {__shfl_sync(~0u, third.x, holder), __shfl_sync(~0u, third.y, holder)};
      if (holder >= 32) e = far;
    }
    return e;
  }
};

// Takes a unit of lines of one row and copies them to the row's places. One warp. The lines are
// polled before it is known whether the source sends such a row at all. False if they did not come
// in time.
template <class P>
__device__ __forceinline__ bool place_unit(const P& p, const Shared& s, uint64_t epoch,
                                           uint32_t source, uint32_t slot, uint32_t first_line) {
  const ep_group& g = p.a.group;
  const LaneInLine lane;
  const RowShape shape = p.row();
  const uint32_t lines = shape.lines();
  const uint32_t header_lines = p.a.layout.header_lines;
  const uint8_t* row = reinterpret_cast<const uint8_t*>(
      p.rows_at(shared_at<uint64_t>(s.partners)[g.rank], source, epoch) +
      slot * p.a.layout.row_stride);
  const uint32_t thread = threadIdx.x % 32;
  const uint8_t* from = row + (header_lines + first_line + lane.line) * kLine + lane.piece * 16;
  bool certain = __all_sync(~0u, placeable(s));
  if (certain && slot >= shared_at<uint32_t>(s.source_rows)[source]) return true;

  const uint32_t unit_lines = min(lines - first_line, P::kUnitLines);
  const uint8_t* watched =
      row + (header_lines + first_line + unit_lines) * kLine - sizeof(uint64_t);
  Header header;
  uint4 data[P::kLoads] = {};
  auto load = [&] {
    header.load(row, header_lines);
#pragma unroll
    for (uint32_t i = 0; i < P::kLoads; ++i) {
      const uint32_t at = i * kLinesPerWarp;
      if (at + lane.line < unit_lines) data[i] = arch::ld_relaxed_sys_v4(from + at * kLine);
    }
  };
  load();

  // Worked out while the first loads are on their way: where this lane's pieces stand in a row, of
  // load i a constant after load i - 1, and in `kinds` what they are.
  const uint32_t line = first_line + lane.line;
  const uint32_t start =
      lane.last() ? 16 * shape.whole() + 8 * (line - shape.scales) : 16 * (7 * line + lane.piece);
  const uint32_t end = 16 * (lane.last() ? shape.body : shape.whole());
  const bool has_scales = P::kFp8 && first_line < shape.scales;
  const uint32_t stride = p.rows_per_expert();
  const uint64_t out = arch::opaque(p.a.recv_x + static_cast<int64_t>(static_cast<int32_t>(start)));
  const uint64_t out_scales = arch::opaque(p.a.recv_scales + uint64_t{8 * line} * stride);
  constexpr uint32_t kBody = 1, kHalf = 2, kScale = 4, kSecondScale = 8, kKindBits = 4;
  uint32_t kinds = 0;
#pragma unroll
  for (uint32_t i = 0; i < P::kLoads; ++i) {
    const uint32_t at = line + i * kLinesPerWarp;
    uint32_t kind = start + i * (kLinesPerWarp * 7 * 16) < end ? kBody : 0;
    if (lane.last()) kind = at >= shape.scales && start + i * (kLinesPerWarp * 8) < end ? kHalf : 0;
    if (lane.last() && 2 * at < p.scale_words()) kind |= kScale;
    if (lane.last() && 2 * at + 1 < p.scale_words()) kind |= kSecondScale;
    kinds |= kind << kKindBits * i;
  }
  kinds = static_cast<uint32_t>(arch::opaque(kinds));
  auto is = [&](uint32_t kind, uint32_t i) { return (kinds >> kKindBits * i & kind) != 0; };

  Patience patience;
  bool complete = false;
  for (;;) {
    bool mine = true;
#pragma unroll
    for (uint32_t i = 0; i < P::kLoads; ++i)
      mine &= i * kLinesPerWarp + lane.line >= unit_lines || sealed(data[i], epoch);
    complete = __all_sync(~0u, (mine || !lane.last()) && header.is_whole(header_lines, epoch));
    if (complete) break;
    bool passed = false;
#pragma unroll
    for (uint32_t i = 0; i < P::kLoads; ++i) passed |= lane.last() && has_passed(data[i], epoch);
    bool over = false;
    do {
      if (!certain && __all_sync(~0u, placeable(s))) {
        certain = true;
        if (slot >= shared_at<uint32_t>(s.source_rows)[source]) return true;
      }
      // Until the readers are done, their patience is what counts.
      if (certain && __any_sync(~0u, passed || patience.expired(g, kDispatchRecv, epoch)))
          [[unlikely]] {
        if (thread == 0) report_timeout(g, kDispatchRecv, epoch, EP_PHASE_ROWS, source);
        over = true;
      }
    } while (P::kWatches && !over && arch::ld_relaxed_sys_u64(watched) < epoch);
    if (over) break;
    load();
  }

  // Lane e has entry e.
  const uint2 entry = header.entry(header_lines);
  const uint32_t entries = min(header.entries(), g.max_top_k);
  const uint32_t expert = entry.x & (EP_MAX_LOCAL_EXPERTS - 1);
  if (!certain) {
    await(&shared_at<Fixed>(s.fixed)->placeable, 0);
    if (slot >= shared_at<uint32_t>(s.source_rows)[source]) return true;
  }
  auto map = [&] {
    return reinterpret_cast<uint64_t*>(p.a.handle.recv_map) +
           (uint64_t{source} * g.max_tokens + slot) * (1 + g.max_top_k);
  };
  if (complete && first_line == 0 && header.token() >= g.max_tokens) [[unlikely]] {
    // No rank sends such a row.
    if (thread == 0) report_timeout(g, kDispatchRecv, epoch, EP_PHASE_ROWS, source);
    complete = false;
  }
  if (!complete) {
    if (first_line == 0 && thread == 0) map()[0] = 0;
    return false;
  }
  // The rank can place an entry that its counts have room for.
  const bool is_entry = thread < entries && expert < p.plan.local_experts.value;
  const uint32_t* begin =
      shared_at<uint32_t>(s.begin) + (is_entry ? expert : 0) * (g.num_ranks + 1) + source;
  const uint32_t first = begin[0];
  const uint32_t in_expert =
      is_entry && (entry.x >> 16) < begin[1] - first ? first + (entry.x >> 16) : kNowhere;
  const uint32_t place =
      in_expert != kNowhere ? expert * p.rows_per_expert() + in_expert : kNowhere;
  const uint32_t placed = __ballot_sync(~0u, in_expert != kNowhere);

#pragma unroll 1
  for (uint32_t e = 0; e < entries; e += kCopies) {
    uint32_t row_at[kCopies];
#pragma unroll
    for (uint32_t n = 0; n < kCopies; ++n) row_at[n] = __shfl_sync(~0u, place, e + n);
#pragma unroll
    for (uint32_t n = 0; n < kCopies; ++n) {
      const bool there = row_at[n] != kNowhere;
      uint8_t* to = reinterpret_cast<uint8_t*>(out + uint64_t{row_at[n]} * p.row_bytes());
#pragma unroll
      for (uint32_t i = 0; i < P::kLoads; ++i) {
        arch::st_v4_if(there && is(kBody, i), to + i * (kLinesPerWarp * 7 * 16), data[i]);
        arch::st_v2_if(there && is(kHalf, i), to + i * (kLinesPerWarp * 8), {data[i].x, data[i].y});
      }
    }
    if (has_scales) {
      uint32_t expert_of_row[kCopies];
#pragma unroll
      for (uint32_t n = 0; n < kCopies; ++n) expert_of_row[n] = __shfl_sync(~0u, expert, e + n);
#pragma unroll
      for (uint32_t n = 0; n < kCopies; ++n) {
        const bool there = row_at[n] != kNowhere;
        uint32_t* scales = reinterpret_cast<uint32_t*>(out_scales) +
                           uint64_t{expert_of_row[n] * (p.scale_words() - 1)} * stride + row_at[n];
#pragma unroll
        for (uint32_t i = 0; i < P::kLoads; ++i) {
          uint32_t* to_word = scales + uint64_t{i * 2 * kLinesPerWarp} * stride;
          arch::st_u32_if(there && is(kScale, i), to_word, data[i].x);
          arch::st_u32_if(there && is(kSecondScale, i), to_word + stride, data[i].y);
        }
      }
    }
  }
  if (first_line == 0) {
    const uint32_t token = header.token();
    arch::st_v2_if(in_expert != kNowhere, map() + 1 + __popc(placed & ((1u << thread) - 1)),
                   {place, entry.y});
    arch::st_u32_if(in_expert != kNowhere, reinterpret_cast<int32_t*>(p.a.src_info) + place, token);
    arch::st_v2_if(thread == 0, map(), {token, static_cast<uint32_t>(__popc(placed))});
  }
  return true;
}

// Gives up the sources of which something did not come in time. Of a row some warps may have placed
// their lines, the one that keeps the row's route among them, and others not, so combine must not
// take what has come for whole rows. One warp.
template <class P>
__device__ __forceinline__ void give_up_sources(const P& p, uint64_t epoch) {
  const Control control(p.a.group);
  uint32_t* recv_rows = reinterpret_cast<uint32_t*>(p.a.handle.recv_rows);
  __syncwarp();  // what a lane has reported, all have
  for (uint32_t r = threadIdx.x % 32; r < p.a.group.num_ranks; r += 32)
    if (arch::ld_relaxed_gpu_u64(control.reported(kDispatchRecv, r)) == epoch)
      arch::atom_exch_relaxed_gpu_u32(recv_rows + r, given_up_mark(epoch));
}

// Places rows until there are none left: what every warp does in the end. Sources take turns,
// because their rows arrive at the same time. Neighbouring units go to different blocks, so that
// few rows already use all that place, and other parts of a row each time, because the first take
// longer; a block's warps take its units in order, the placers first.
template <class P>
__device__ __forceinline__ void place(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  Fixed* fixed = shared_at<Fixed>(s.fixed);
  const uint32_t units_per_row = div_up(p.row().lines(), P::kUnitLines);
  const uint32_t blocks = p.plan.placing_blocks;
  uint32_t rows = g.max_tokens * g.num_ranks;
  bool certain = false;
  auto take = [&] {
    uint32_t taken = 0;
    if (threadIdx.x % 32 == 0) taken = atomicAdd(&fixed->units_taken, 1);
    return __shfl_sync(~0u, taken, 0);
  };
  const uint32_t first = threadIdx.x / 32 - kSenderWarps;
  uint32_t unit = first < P::kPlacerWarps ? first : take();
  bool in_time = true;
#pragma unroll 1
  for (;; unit = take()) {
    // To poll what is not likely to come would cost other warps time.
    if (!certain && unit >= p.plan.likely_units) await(&fixed->placeable, 0);
    constexpr uint32_t kTurns = 8;
    const uint32_t later = unit % kTurns < blocks ? unit % kTurns : 0;
    const uint32_t block = blockIdx.x - p.plan.first_placing + later;
    const uint32_t u = unit * blocks + (block < blocks ? block : block - blocks);
    const uint32_t row = u / units_per_row;
    if (!certain && (certain = __all_sync(~0u, placeable(s))))
      rows = fixed->most_rows * g.num_ranks;
    if (row >= rows) break;
    const uint32_t slot = row / g.num_ranks;
    const uint32_t turn = row - slot * g.num_ranks + g.rank;
    const uint32_t source = turn < g.num_ranks ? turn : turn - g.num_ranks;
    if (shared_at<uint64_t>(s.partners)[source] == 0) continue;
    const uint32_t first_line = (u - row * units_per_row) * P::kUnitLines;
    in_time &= place_unit(p, s, epoch, source, slot, first_line);
  }
  if (!in_time) [[unlikely]]
    give_up_sources(p, epoch);
}

template <uint32_t H, bool FP8, class W>
__global__ void __launch_bounds__(W::kThreads, 1)
    dispatch(const __grid_constant__ ep_dispatch_args args, const __grid_constant__ Plan plan) {
  constexpr uint32_t kRouterWarp = W::kRouterWarp;
  constexpr uint32_t kFirstReader = W::kFirstReader;
  const Problem<H, FP8, W> p(args, plan);
  const ep_group& g = args.group;
  const Control control(g);
  const Shared& s = plan.shared;
  Fixed* fixed = shared_at<Fixed>(s.fixed);
  const bool sends = (args.flags & EP_DISPATCH_SEND) != 0;
  const bool receives = (args.flags & EP_DISPATCH_RECV) != 0;
  const bool places = receives && blockIdx.x >= plan.first_placing;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  const Chunk chunk(p);
  const bool has_tokens = sends && chunk.size() != 0;
  const bool counts = has_tokens || (sends && tells_counts(p));

  // What tasks need first is on its way while the block meets.
  Group16 x;
  RouterLoad entry;
  TokenIds ids;
  ControlLoad known;
  if (warp < kSenderWarps) {
    // bf16 is not needed before its routes are, which need the ids first.
    if (FP8 && has_tokens) x = load_group(p, chunk.from, threadIdx.x);
  } else if (warp < kRouterWarp) {
    if (counts) {
      ids = load_ids(p, 0, chunk.from);
      clear<W>(s.rank_rows, s.row_base);
      // The scales of a row may end within a piece of a line.
      if (FP8) {
#pragma unroll
        for (uint32_t i = 0; i < kPlaces; ++i) {
          const uint32_t row = s.rows + i * Shared::quantised_bytes(p.hidden());
          clear<W>(row, row + Shared::scale_bytes(p.hidden()));
        }
      }
    }
  } else if (warp == kRouterWarp) {
    if (has_tokens) entry = RouterLoad(p, chunk, chunk.from);
  } else if (warp == kFirstReader) {
    known = ControlLoad(g, control);
  } else if (threadIdx.x == 32 * kFirstReader + 32) {
    arch::mbarrier_init(&fixed->known, 32);
    arch::mbarrier_init(&fixed->counted, W::kPlacers);
    for (uint32_t i = 0; i < kPlaces; ++i) {
      arch::mbarrier_init(&fixed->routed[i], 32);
      arch::mbarrier_init(&fixed->sent[i], kSenders);
    }
    arch::mbarrier_init(&fixed->placeable, W::kReaders);
    fixed->units_taken = W::kPlacerWarps;
  }
  __syncthreads();

  // To advance an epoch is to wait for all that the multiprocessor has stored so far, so it is done
  // early, and by a warp that has nothing else to do yet.
  if (warp == (has_tokens ? kFirstReader + 1 : kRouterWarp)) {
    await(&fixed->known, 0);
    if (lane == 0 && sends) advance(control, kDispatchSend, fixed->send_epoch);
    if (lane == 1 && receives) advance(control, kDispatchRecv, fixed->recv_epoch);
    __syncwarp();
  }
  if (warp < kSenderWarps) {
    if (has_tokens) send(p, s, chunk, x);
  } else if (warp < kRouterWarp) {
    if (counts) count(p, s, chunk, ids);
  } else if (warp == kRouterWarp) {
    if (has_tokens) route(p, s, chunk, entry);
  } else {
    if (warp == kFirstReader) known.keep(p, s, control);
    if (places) {
      await(&fixed->known, 0);
      read_counts(p, s, fixed->recv_epoch);
      if (blockIdx.x == plan.first_placing) write_counts(p, s, fixed->recv_epoch);
    }
  }
  if (places) {
    await(&fixed->known, 0);
    place(p, s, fixed->recv_epoch);
  }
}

struct DispatchKernel {
  void (*kernel)(const ep_dispatch_args, const Plan);
  uint32_t threads;
  uint32_t unit_lines;
};

template <uint32_t H, bool FP8, class W>
constexpr DispatchKernel kKernel = {dispatch<H, FP8, W>, W::kThreads, W::kUnitLines};

template <bool FP8, class W>
const DispatchKernel& kernel_for(uint32_t hidden) {
  switch (hidden) {
  case 3584: return kKernel<3584, FP8, W>;
  case 7168: return kKernel<7168, FP8, W>;
  default: return kKernel<0, FP8, W>;
  }
}

// Both ways give the same bits.
const DispatchKernel& kernel_for(uint32_t hidden, bool fp8, bool few_tokens) {
  if (fp8)
    return few_tokens ? kernel_for<true, FewTokens>(hidden) : kernel_for<true, ManyTokens>(hidden);
  return few_tokens ? kernel_for<false, FewTokens>(hidden) : kernel_for<false, ManyTokens>(hidden);
}

// Loads every kernel of a way onto the current device.
template <class W>
cudaError_t load_way() {
  return load(dispatch<3584, false, W>, dispatch<3584, true, W>, dispatch<7168, false, W>,
              dispatch<7168, true, W>, dispatch<0, false, W>, dispatch<0, true, W>);
}

bool is_sound(const ep_dispatch_args& a) {
  constexpr uint32_t kParts = EP_DISPATCH_SEND | EP_DISPATCH_RECV;
  constexpr uint32_t kFlags =
      kParts | EP_DISPATCH_FP8 | EP_DISPATCH_WEIGHTS | EP_DISPATCH_POW2 | EP_DISPATCH_UE8M0;
  if (a.struct_size != sizeof(a) || (a.flags & kParts) == 0 || !group_is_sound(a.group) ||
      !handle_is_sound(a.handle, a.group, a.layout) || !aligned_for_vectors(a.x, a.recv_x))
    return false;
  if ((a.flags & EP_DISPATCH_SEND) != 0 && a.handle.num_tokens != 0 &&
      (a.x == 0 || a.topk_idx == 0))
    return false;
  if ((a.flags & EP_DISPATCH_WEIGHTS) != 0 && a.handle.num_tokens != 0 && a.topk_weights == 0)
    return false;
  if ((a.flags & ~kFlags) != 0 ||
      ((a.flags & EP_DISPATCH_UE8M0) != 0 && (a.flags & EP_DISPATCH_POW2) == 0) ||
      ((a.flags & EP_DISPATCH_POW2) != 0 && (a.flags & EP_DISPATCH_FP8) == 0))
    return false;
  return (a.flags & EP_DISPATCH_RECV) == 0 ||
         (a.recv_x != 0 && a.recv_count != 0 && a.src_info != 0 && a.layout_range != 0 &&
          ((a.flags & EP_DISPATCH_FP8) == 0 || a.recv_scales != 0));
}

}  // namespace
}  // namespace ep

cudaError_t ep::load_dispatch() {
  const cudaError_t e = load_way<FewTokens>();
  return e != cudaSuccess ? e : load_way<ManyTokens>();
}

extern "C" int32_t ep_dispatch_launch(const ep_dispatch_args* args, void* stream,
                                      int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || !is_sound(*args)) return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->group.device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  const bool fp8 = (args->flags & EP_DISPATCH_FP8) != 0;
  unsigned grid = 0;
  cudaError_t e = grid_for(args->group, &grid);
  if (e != cudaSuccess) return status_of(e, cuda_error);
  const Division division(*args, grid);
  const DispatchKernel& k = kernel_for(args->group.hidden, fp8, division.few_tokens);
  const Plan plan(*args, fp8, k.unit_lines, division);
  const int32_t status = allow_shared(k.kernel, plan.shared.bytes, args->group.device, cuda_error);
  if (status != EP_LAUNCH_OK) return status;
  e = launch(k.kernel, grid, k.threads, plan.shared.bytes, stream, *args, plan);
  return status_of(e, cuda_error);
}
