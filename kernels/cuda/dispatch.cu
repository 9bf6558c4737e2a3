// Dispatch: every token once to each rank that owns one of its experts, spread there over the
// experts.
//
// Warps of a block have one task each and wait for no other block:
//   senders   count the entries before the block's tokens, quantise, and store whole lines to the
//             peers;
//   a router  gives each token its slots, so that the same input gives the same bits: a slot is a
//             prefix sum in token order;
//   readers   poll all sources' counts and sum them to where each source's rows begin;
//   placers   take a row's lines as they arrive and copy them to the row's experts.
// The last block first tells every rank its counts.

#include "arch/fp8.cuh"
#include "arch/mbarrier.cuh"
#include "group.cuh"
#include "launch.cuh"
#include "line.cuh"

namespace ep {
namespace {

constexpr uint32_t kSenderWarps = 14;
constexpr uint32_t kPlacerWarps = 11;
constexpr uint32_t kReaderWarps = 2;
constexpr uint32_t kRouterWarp = kSenderWarps + kPlacerWarps;
constexpr uint32_t kFirstReader = kRouterWarp + 1;
constexpr uint32_t kThreads = 32 * (kFirstReader + kReaderWarps);
constexpr uint32_t kReaders = 32 * kReaderWarps;
constexpr uint32_t kSenders = 32 * kSenderWarps;
constexpr uint32_t kSendersAndRouter = kSenders + 32;

// Named barriers.
constexpr uint32_t kSendBarrier = 1;
constexpr uint32_t kCountedBarrier = 2;
constexpr uint32_t kRoutedBarrier = 3;  // and 4: by batch parity
constexpr uint32_t kFreeBarrier = 5;    // and 6
constexpr uint32_t kReadBarrier = 7;
constexpr uint32_t kMeetBarrier = 8;  // the whole block, each task at its own place

constexpr uint32_t kBatch = 4;  // tokens routed at once
constexpr uint32_t kLoads = 4;  // line loads in flight per lane and unit of placing
constexpr uint32_t kUnitLines = kLoads * kLinesPerWarp;
constexpr uint32_t kNowhere = ~0u;
constexpr uint32_t kChannelsPerScale = 128;

struct Fixed {
  uint64_t send_epoch;
  uint64_t recv_epoch;
  uint64_t placeable;  // barrier: readers arrive once `begin` and `source_rows` are complete
};

// Offsets of what a block keeps in its dynamic shared memory.
struct Shared {
  uint32_t fixed;         // Fixed
  uint32_t partners;      // u64 [R] bases of the ranks that take part, else 0
  uint32_t source_rows;   // u32 [R] rows from each source
  uint32_t begin;         // u32 [L][R + 1] first row of each source
  uint32_t rank_rows;     // u32 [R] rows for each rank so far
  uint32_t expert_rows;   // u32 [E] entries of each expert so far
  uint32_t destinations;  // u32 [2][kBatch] how many
  uint32_t row_base;      // u64 [2][kBatch][D] where a token's row goes at each of its destinations
  uint32_t header;        // u64 [2][kBatch][D][1 + K]
  uint32_t scales;        // u32 [2][scale_stride]
  uint32_t body;          // u8 [2][H] quantised rows
  uint32_t bytes;

  Shared(const ep_group& g, uint32_t top_k, uint32_t hidden, bool fp8) {
    const uint32_t d = max_destinations(g, top_k);
    fixed = 0;
    partners = align16(sizeof(Fixed));
    source_rows = align16(partners + 8 * g.num_ranks);
    begin = align16(source_rows + 4 * g.num_ranks);
    rank_rows = align16(begin + 4 * (g.num_experts / g.num_ranks) * (g.num_ranks + 1));
    expert_rows = align16(rank_rows + 4 * g.num_ranks);
    destinations = align16(expert_rows + 4 * g.num_experts);
    row_base = align16(destinations + 4 * 2 * kBatch);
    header = row_base + 8 * 2 * kBatch * d;
    scales = align16(header + 8 * 2 * kBatch * d * (1 + top_k));
    body = scales + (fp8 ? 2 * 4 * scale_stride(hidden) : 0);
    bytes = body + (fp8 ? 2 * hidden : 0);
  }

  static __host__ __device__ uint32_t align16(uint32_t at) { return (at + 15) & ~15u; }
  static __host__ __device__ uint32_t scale_stride(uint32_t hidden) {
    return (hidden / kChannelsPerScale + 3) & ~3u;
  }
  static __host__ __device__ uint32_t max_destinations(const ep_group& g, uint32_t top_k) {
    return top_k < g.num_ranks ? top_k : g.num_ranks;
  }
};

extern __shared__ __align__(16) uint8_t shared_memory[];

template <class T>
__device__ __forceinline__ T* shared_at(uint32_t offset) {
  return reinterpret_cast<T*>(shared_memory + offset);
}

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

// What the host works out once for all blocks.
struct Plan {
  Shared shared;
  Divisor local_experts;
  Divisor packets_per_source;
  uint32_t tokens_per_block;  // or 1, where blocks share a token's destinations:
  uint32_t blocks_per_token;  // each takes every `blocks_per_token`th
  Plan(const ep_dispatch_args& a, bool fp8, uint32_t grid)
      : shared(a.group, a.handle.top_k, a.group.hidden, fp8),
        local_experts(a.group.num_experts / a.group.num_ranks),
        packets_per_source(local_experts.value + 1),
        tokens_per_block(div_up(a.handle.num_tokens, grid)), blocks_per_token(1) {
    // One multiprocessor alone stores far slower than the links.
    const uint32_t tokens = a.handle.num_tokens;
    if (tokens != 0 && 2 * tokens <= grid) {
      const uint32_t d = Shared::max_destinations(a.group, a.handle.top_k);
      blocks_per_token = grid / tokens < d ? grid / tokens : d;
    }
  }
};

// What all tasks derive from the arguments. H is the hidden size where it is known at compile time.
template <uint32_t H, bool FP8>
struct Problem {
  const ep_dispatch_args& a;
  const Plan& plan;

  __device__ __forceinline__ Problem(const ep_dispatch_args& args, const Plan& p)
      : a(args), plan(p) {}

  __device__ __forceinline__ uint32_t hidden() const { return H != 0 ? H : a.group.hidden; }
  __device__ __forceinline__ bool ue8m0() const {
    return FP8 && (a.flags & EP_DISPATCH_UE8M0) != 0;
  }
  __device__ __forceinline__ uint32_t scale_words() const {
    return !FP8      ? 0
           : ue8m0() ? div_up(hidden(), 4 * kChannelsPerScale)
                     : hidden() / kChannelsPerScale;
  }
  __device__ __forceinline__ RowShape row() const {
    return {hidden() / (FP8 ? 16 : 8), div_up(scale_words(), 2)};
  }
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

// The smallest power of two that is not less than n, 1..=32.
__device__ __forceinline__ uint32_t power_of_two(uint32_t n) {
  uint32_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// Lanes of a warp that look at entries of the same token, `width` (a power of two) lanes a token.
struct EntryLane {
  uint32_t width;
  uint32_t token;  // of the tokens that the warp looks at
  uint32_t k;
  __device__ __forceinline__ explicit EntryLane(uint32_t top_k)
      : width(power_of_two(top_k)), token((threadIdx.x % 32) / width),
        k((threadIdx.x % 32) % width) {}
  __device__ __forceinline__ uint32_t tokens_per_warp() const { return 32 / width; }
};

enum Kind : uint32_t { kNone, kValid, kOutOfRange, kRepeated };

// What a lane's entry is, and whether it is the token's first valid one with its owner.
struct Entry {
  Kind kind;
  uint32_t expert;
  uint32_t owner;
  bool leads;
  __device__ __forceinline__ bool valid() const { return kind == kValid; }
};

// Looks at the entries of all lanes of the warp; lanes without one pass -1. The lanes of a token
// are compared one by one: `match` instructions take longer the more values differ.
template <class P>
__device__ __forceinline__ Entry classify(const P& p, const EntryLane& e, int64_t id) {
  const bool in_range = id >= 0 && id < static_cast<int64_t>(p.a.group.num_experts);
  Entry entry;
  entry.expert = in_range ? static_cast<uint32_t>(id) : kNowhere;
  entry.owner = in_range ? p.plan.local_experts.quotient(entry.expert) : kNowhere;
  bool repeated = false;
  entry.leads = true;
#pragma unroll 1
  for (uint32_t back = 1; back < p.a.handle.top_k; ++back) {
    const uint32_t expert = __shfl_up_sync(~0u, entry.expert, back, e.width);
    const uint32_t owner = __shfl_up_sync(~0u, entry.owner, back, e.width);
    if (e.k >= back) {
      repeated |= expert == entry.expert;
      // An earlier entry with this owner is valid, or repeats one that is.
      entry.leads &= owner != entry.owner;
    }
  }
  entry.kind = !in_range ? (id == -1 ? kNone : kOutOfRange) : repeated ? kRepeated : kValid;
  entry.leads &= entry.valid();
  return entry;
}

// The entry that a sending thread looks at when the warps' tokens begin at `base`; -1 if it has
// none.
template <class P>
__device__ __forceinline__ int64_t load_entry(const P& p, const EntryLane& e, uint32_t base,
                                              uint32_t to) {
  const uint32_t t = base + threadIdx.x / 32 * e.tokens_per_warp() + e.token;
  const int64_t* ids = reinterpret_cast<const int64_t*>(p.a.topk_idx);
  return t < to && e.k < p.a.handle.top_k ? ids[uint64_t{t} * p.a.handle.top_k + e.k] : -1;
}

// Adds the entries of tokens [0, to) to the running counts; `first` is load_entry at 0. All
// senders.
template <class P>
__device__ __forceinline__ void count_entries(const P& p, const Shared& s, const EntryLane& e,
                                              int64_t first, uint32_t to) {
  const uint32_t step = kSenderWarps * e.tokens_per_warp();
  int64_t next = first;
#pragma unroll 1
  for (uint32_t base = 0; base < to; base += step) {
    // `first` may have been loaded beyond `to`.
    const bool counts = base + threadIdx.x / 32 * e.tokens_per_warp() + e.token < to;
    const int64_t id = counts ? next : -1;
    next = load_entry(p, e, base + step, to);
    const Entry entry = classify(p, e, id);
    if (entry.valid()) atomicAdd(&shared_at<uint32_t>(s.expert_rows)[entry.expert], 1);
    if (entry.leads) atomicAdd(&shared_at<uint32_t>(s.rank_rows)[entry.owner], 1);
  }
}

__device__ __forceinline__ void clear_counts(const Shared& s, const ep_group& g) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < g.num_ranks; i += kSenders)
    shared_at<uint32_t>(s.rank_rows)[i] = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < g.num_experts; i += kSenders)
    shared_at<uint32_t>(s.expert_rows)[i] = 0;
}

// Tells every rank how many rows it gets, and how many of them go to each of its experts. All
// senders.
template <class P>
__device__ __forceinline__ void send_counts(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const Divisor& per_rank = p.plan.packets_per_source;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < g.num_ranks * per_rank.value; i += kSenders) {
    const uint32_t rank = per_rank.quotient(i);
    const uint32_t at = i - rank * per_rank.value;
    const uint64_t partner = shared_at<uint64_t>(s.partners)[rank];
    if (partner == 0) continue;
    const uint32_t value =
        at == 0 ? shared_at<uint32_t>(s.rank_rows)[rank]
                : shared_at<uint32_t>(s.expert_rows)[rank * p.plan.local_experts.value + at - 1];
    arch::st_relaxed_sys_u64(reinterpret_cast<uint64_t*>(p.counts_at(partner, g.rank, epoch)) + at,
                             packet(value, epoch));
  }
}

// Routes one token: slots, positions, header and destinations, left at `place` of the batches. One
// warp; a lane has an entry. Of the blocks that share a token, one `writes` what this rank keeps.
template <class P>
__device__ __forceinline__ void route_token(const P& p, const Shared& s, uint64_t epoch,
                                            uint32_t token, uint32_t place, bool writes, int64_t id,
                                            float weight) {
  const ep_group& g = p.a.group;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t top_k = p.a.handle.top_k;
  const Entry entry = classify(p, EntryLane(32), id);
  if (writes && (entry.kind == kOutOfRange || entry.kind == kRepeated)) [[unlikely]]
    record_fault(g, kDispatchSend, epoch,
                 entry.kind == kOutOfRange ? EP_FAULT_EXPERT_RANGE : EP_FAULT_EXPERT_REPEATED,
                 EP_PHASE_SEND, g.rank, token, id);
  const bool valid = entry.valid();
  const uint32_t owner = valid ? entry.owner : 0;
  const uint32_t same = __match_any_sync(~0u, valid ? owner : ~lane);
  const bool leads = entry.leads;
  const uint64_t partner = shared_at<uint64_t>(s.partners)[owner];
  const bool reachable = valid && partner != 0;

  uint32_t slot = 0;
  if (leads) slot = shared_at<uint32_t>(s.rank_rows)[owner]++;
  slot = __shfl_sync(~0u, slot, __ffs(same) - 1);
  uint32_t position = 0;
  if (valid) position = shared_at<uint32_t>(s.expert_rows)[entry.expert]++;
  if (leads && !reachable && peer_base(g, owner) == 0) [[unlikely]]
    record_peer_fault(g, kDispatchSend, epoch, EP_FAULT_UNREACHABLE, EP_PHASE_SEND, owner, token,
                      0);

  // Destinations in the order of ranks after this one, so that at any time ranks send to different
  // ones; the header's entries in top-k order.
  const uint32_t turn = (owner + g.num_ranks - g.rank - 1) % g.num_ranks;
  uint32_t index = 0;
  const uint32_t leaders = __ballot_sync(~0u, leads && reachable);
#pragma unroll 1
  for (uint32_t rest = leaders; rest != 0; rest &= rest - 1) {
    const uint32_t other = __shfl_sync(~0u, turn, __ffs(rest) - 1);
    index += other < turn;
  }
  const uint32_t max_destinations = Shared::max_destinations(g, top_k);
  uint64_t* header =
      shared_at<uint64_t>(s.header) + (place * max_destinations + index) * (1 + top_k);
  if (reachable) {
    const uint32_t at = __popc(same & ((1u << lane) - 1));
    header[1 + at] = uint64_t{__float_as_uint(weight)} << 32 | position << 16 | lane << 11 |
                     (entry.expert - owner * p.plan.local_experts.value);
    if (leads) {
      header[0] = uint64_t{static_cast<uint32_t>(__popc(same))} << 32 | token;
      shared_at<uint64_t>(s.row_base)[place * max_destinations + index] =
          p.rows_at(partner, g.rank, epoch) + slot * p.a.layout.row_stride;
    }
  }
  if (lane == 0) shared_at<uint32_t>(s.destinations)[place] = __popc(leaders);
  if (writes && lane < top_k) {
    uint32_t* route = reinterpret_cast<uint32_t*>(p.a.handle.route) + uint64_t{token} * g.max_top_k;
    route[lane] = reachable ? owner << 16 | slot : kNowhere;
  }
  __syncwarp();
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

// Quantises a token into shared memory. A sender has 16 channels at a time, eight share a scale;
// `first` is load_group of the thread's first group.
template <class P>
__device__ __forceinline__ void quantise(const P& p, uint32_t token, Group16 first, uint8_t* body,
                                         uint32_t* scales) {
  const uint32_t groups = p.hidden() / 16;
  const bool pow2 = (p.a.flags & EP_DISPATCH_POW2) != 0;
  for (uint32_t base = 0; base < groups; base += kSenders) {
    const uint32_t i = base + threadIdx.x;
    const Group16 in = base == 0 ? first : load_group(p, token, i);
    const uint32_t word[8] = {in.half[0].x, in.half[0].y, in.half[0].z, in.half[0].w,
                              in.half[1].x, in.half[1].y, in.half[1].z, in.half[1].w};
    float amax = 0.0f;
#pragma unroll
    for (uint32_t w : word) {
      const float2 f = bf16x2_to_float2(w);
      amax = fmaxf(amax, fmaxf(fabsf(f.x), fabsf(f.y)));
    }
#pragma unroll
    for (int mask = 4; mask != 0; mask /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, mask));
    const Scale scale = scale_of(amax, pow2);
    uint32_t q[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 lo = bf16x2_to_float2(word[2 * w]);
      const float2 hi = bf16x2_to_float2(word[2 * w + 1]);
      q[w] = arch::cvt_e4m3x2_rn_satfinite(lo.x * scale.multiply, lo.y * scale.multiply) |
             arch::cvt_e4m3x2_rn_satfinite(hi.x * scale.multiply, hi.y * scale.multiply) << 16;
    }
    if (i < groups) {
      reinterpret_cast<uint4*>(body)[i] = {q[0], q[1], q[2], q[3]};
      if (i % 8 == 0) {
        if (p.ue8m0())
          reinterpret_cast<uint8_t*>(scales)[i / 8] =
              static_cast<uint8_t>(__float_as_uint(scale.inverse) >> 23);
        else
          scales[i / 8] = __float_as_uint(scale.inverse);
      }
    }
  }
}

// The piece of a line that this lane carries, from the token's row.
template <bool FP8, class P>
__device__ __forceinline__ uint4 piece_of(const P& p, const RowShape& shape, const uint8_t* body,
                                          const uint32_t* scales, uint32_t line,
                                          const LaneInLine& lane, uint64_t epoch) {
  if (!lane.last()) {
    const uint32_t unit = 7 * line + lane.piece;
    if (unit >= shape.whole()) return {};
    return FP8 ? reinterpret_cast<const uint4*>(body)[unit] : arch::ld_stream_v4(body + 16 * unit);
  }
  uint2 data = {};
  if (line < shape.scales) {
    data = reinterpret_cast<const uint2*>(scales)[line];
  } else {
    const uint32_t at = 16 * shape.whole() + 8 * (line - shape.scales);
    if (at < 16 * shape.body)
      data = FP8 ? *reinterpret_cast<const uint2*>(body + at) : arch::ld_stream_v2(body + at);
  }
  return seal(data, epoch);
}

// What a block sends: tokens [from, to), and of their destinations every `stride`th from `first`
// on.
struct Chunk {
  uint32_t from;
  uint32_t to;
  uint32_t first;
  uint32_t stride;
  template <class P>
  __device__ __forceinline__ explicit Chunk(const P& p) : stride(p.plan.blocks_per_token) {
    const uint32_t token = stride == 1 ? blockIdx.x : blockIdx.x / stride;
    first = blockIdx.x - token * stride;
    from = min(token * p.plan.tokens_per_block, p.a.handle.num_tokens);
    to = min(from + p.plan.tokens_per_block, p.a.handle.num_tokens);
  }
  __device__ __forceinline__ uint32_t size() const { return to - from; }
  __device__ __forceinline__ uint32_t batches() const { return div_up(size(), kBatch); }
};

// Stores the routed token at `place` to the chunk's destinations. All senders.
template <bool FP8, class P>
__device__ __forceinline__ void send_token(const P& p, const Shared& s, const Chunk& chunk,
                                           uint32_t place, const uint8_t* body,
                                           const uint32_t* scales, uint64_t epoch) {
  const uint32_t warp = threadIdx.x / 32;
  const LaneInLine lane;
  const uint32_t top_k = p.a.handle.top_k;
  const uint32_t max_destinations = Shared::max_destinations(p.a.group, top_k);
  const uint32_t header_lines = p.a.layout.header_lines;
  const uint32_t offset = lane.line * kLine + lane.piece * 16;
  const RowShape shape = p.row();
  const uint32_t lines = shape.lines();
  const uint32_t destinations = shared_at<uint32_t>(s.destinations)[place];
  const uint64_t* row_base = shared_at<uint64_t>(s.row_base) + place * max_destinations;

#pragma unroll 1
  for (uint32_t d = chunk.first + warp * chunk.stride; d < destinations;
       d += kSenderWarps * chunk.stride) {
    const uint64_t* header =
        shared_at<uint64_t>(s.header) + (place * max_destinations + d) * (1 + top_k);
    const uint32_t entries = static_cast<uint32_t>(header[0] >> 32);
    if (lane.line < header_lines) {
      const uint32_t unit = lane.line * 15 + lane.piece * 2;
      const uint64_t lo = unit <= entries ? header[unit] : 0;
      const uint64_t hi = unit + 1 <= entries ? header[unit + 1] : 0;
      const uint2 first = {static_cast<uint32_t>(lo), static_cast<uint32_t>(lo >> 32)};
      const uint4 piece = lane.last() ? seal(first, epoch)
                                      : uint4{first.x, first.y, static_cast<uint32_t>(hi),
                                              static_cast<uint32_t>(hi >> 32)};
      arch::st_relaxed_sys_v4(reinterpret_cast<uint8_t*>(row_base[d]) + offset, piece);
    }
  }
#pragma unroll 1
  for (uint32_t base = warp * kLinesPerWarp; base < lines; base += kSenderWarps * kLinesPerWarp) {
    const uint32_t line = base + lane.line;
    if (line >= lines) continue;
    const uint4 piece = piece_of<FP8>(p, shape, body, scales, line, lane, epoch);
#pragma unroll 1
    for (uint32_t d = chunk.first; d < destinations; d += chunk.stride)
      arch::st_relaxed_sys_v4(
          reinterpret_cast<uint8_t*>(row_base[d]) + (header_lines + base) * kLine + offset, piece);
  }
}

// The senders' task. What needs no other warp is loaded before the block meets (`meet`).
template <uint32_t H, bool FP8, class Meet>
__device__ __forceinline__ void send(const Problem<H, FP8>& p, const Shared& s, Meet meet) {
  const ep_group& g = p.a.group;
  const uint32_t tokens = p.a.handle.num_tokens;
  const Chunk chunk(p);
  const EntryLane e(p.a.handle.top_k);
  const bool counts = blockIdx.x == gridDim.x - 1;  // the block that most often has no token
  const int64_t first = load_entry(p, e, 0, counts ? tokens : chunk.from);
  Group16 x = {};
  if (FP8 && chunk.size() != 0) x = load_group(p, chunk.from, threadIdx.x);
  clear_counts(s, g);
  if (FP8)
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < 2 * Shared::scale_stride(p.hidden()); i += kSenders)
      shared_at<uint32_t>(s.scales)[i] = 0;
  meet();
  const uint64_t epoch = shared_at<Fixed>(s.fixed)->send_epoch;

  if (counts) {
    count_entries(p, s, e, first, tokens);
    arch::bar_sync(kSendBarrier, kSenders);
    send_counts(p, s, epoch);
    arch::bar_sync(kSendBarrier, kSenders);
    clear_counts(s, g);
    arch::bar_sync(kSendBarrier, kSenders);
  }
  if (chunk.size() == 0) return;
  count_entries(p, s, e, first, chunk.from);
  arch::bar_sync(kCountedBarrier, kSendersAndRouter);

#pragma unroll 1
  for (uint32_t i = 0; i < chunk.size(); ++i) {
    const uint32_t parity = i / kBatch % 2;
    const uint8_t* body =
        reinterpret_cast<const uint8_t*>(p.a.x) + uint64_t{chunk.from + i} * p.hidden() * 2;
    uint32_t* scales = nullptr;
    if (FP8) {
      // Two buffers: while some warps still send one token, others quantise the next.
      uint8_t* quantised = shared_at<uint8_t>(s.body) + i % 2 * p.hidden();
      scales = shared_at<uint32_t>(s.scales) + i % 2 * Shared::scale_stride(p.hidden());
      quantise(p, chunk.from + i, x, quantised, scales);
      if (i + 1 < chunk.size()) x = load_group(p, chunk.from + i + 1, threadIdx.x);
      body = quantised;
    }
    if (i % kBatch == 0)
      arch::bar_sync(kRoutedBarrier + parity, kSendersAndRouter);
    else if (FP8)
      arch::bar_sync(kSendBarrier, kSenders);
    send_token<FP8>(p, s, chunk, parity * kBatch + i % kBatch, body, scales, epoch);
    if (i % kBatch == kBatch - 1 && i / kBatch + 2 < chunk.batches())
      arch::bar_arrive(kFreeBarrier + parity, kSendersAndRouter);
  }
}

// The router's task: two batches at most are ahead of the senders.
template <class P, class Meet>
__device__ __forceinline__ void route(const P& p, const Shared& s, Meet meet) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t top_k = p.a.handle.top_k;
  const Chunk chunk(p);
  const int64_t* ids = reinterpret_cast<const int64_t*>(p.a.topk_idx);
  const float* weights = reinterpret_cast<const float*>(p.a.topk_weights);
  const bool weighted = (p.a.flags & EP_DISPATCH_WEIGHTS) != 0;
  int64_t id;
  float weight;
  auto load = [&](uint32_t t) {
    const bool mine = t < chunk.to && lane < top_k;
    id = mine ? ids[uint64_t{t} * top_k + lane] : -1;
    weight = mine && weighted ? weights[uint64_t{t} * top_k + lane] : 1.0f;
  };
  load(chunk.from);
  meet();
  if (chunk.size() == 0) return;
  const uint64_t epoch = shared_at<Fixed>(s.fixed)->send_epoch;
  arch::bar_sync(kCountedBarrier, kSendersAndRouter);
#pragma unroll 1
  for (uint32_t i = 0; i < chunk.size(); ++i) {
    const uint32_t batch = i / kBatch;
    const int64_t this_id = id;
    const float this_weight = weight;
    load(chunk.from + i + 1);
    if (i % kBatch == 0 && batch >= 2) arch::bar_sync(kFreeBarrier + batch % 2, kSendersAndRouter);
    route_token(p, s, epoch, chunk.from + i, batch % 2 * kBatch + i % kBatch, chunk.first == 0,
                this_id, this_weight);
    if (i % kBatch == kBatch - 1 || i + 1 == chunk.size())
      arch::bar_arrive(kRoutedBarrier + batch % 2, kSendersAndRouter);
  }
}

// One packet of a source's counts when the operation's time is over, or another block's is; 0 if
// the source is given up.
template <class P>
__device__ __forceinline__ uint32_t count_in_doubt(const P& p, uint64_t epoch, uint32_t source,
                                                   const uint64_t* from) {
  const ep_group& g = p.a.group;
  if (!decide_present(g, kDispatchRecv, epoch, source, from)) {
    report_timeout(g, kDispatchRecv, epoch, EP_PHASE_COUNTS, source);
    return 0;
  }
  // A source's packets are stored together; what has not come by now belongs to a source that died.
  const uint64_t seen = arch::ld_acquire_sys_u64(from);
  return packet_is(seen, epoch) ? static_cast<uint32_t>(seen) : 0;
}

// The readers' task: where each source's rows begin.
template <class P>
__device__ __forceinline__ void read_counts(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const Control control(g);
  const uint32_t thread = threadIdx.x - 32 * kFirstReader;
  const Divisor& per_source = p.plan.packets_per_source;
  const uint64_t* partners = shared_at<uint64_t>(s.partners);
  uint32_t* begin = shared_at<uint32_t>(s.begin);
  uint32_t* source_rows = shared_at<uint32_t>(s.source_rows);
  const uint64_t own = p.counts_at(partners[g.rank], 0, epoch);
  constexpr uint32_t kInFlight = 5;
  const uint32_t packets = g.num_ranks * per_source.value;
  for (uint32_t base = thread; base < packets; base += kReaders * kInFlight) {
    const uint64_t* from[kInFlight];
    uint32_t missing = 0;
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; ++j) {
      const uint32_t i = base + kReaders * j;
      const uint32_t source = per_source.quotient(i);
      from[j] = reinterpret_cast<const uint64_t*>(own + source * p.a.layout.counts_source_stride) +
                (i - source * per_source.value);
      if (i < packets && partners[source] != 0) missing |= 1u << j;
    }
    const uint32_t expected = missing;
    uint32_t value[kInFlight] = {};
    Patience patience;
    bool doubt = false;
    while (missing != 0 && !doubt) {
      uint64_t seen[kInFlight];
#pragma unroll
      for (uint32_t j = 0; j < kInFlight; ++j)
        if ((missing >> j & 1) != 0) seen[j] = arch::ld_relaxed_sys_u64(from[j]);
      // Read beside the last packets, the verdict covers all of them.
      const uint64_t verdict = arch::ld_relaxed_gpu_u64(control.any_verdict(kDispatchRecv));
#pragma unroll
      for (uint32_t j = 0; j < kInFlight; ++j) {
        if ((missing >> j & 1) != 0 && packet_is(seen[j], epoch)) {
          value[j] = static_cast<uint32_t>(seen[j]);
          missing &= ~(1u << j);
        }
      }
      doubt =
          !is_open(verdict, epoch) || (missing != 0 && patience.expired(g, kDispatchRecv, epoch));
    }
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; ++j) {
      const uint32_t i = base + kReaders * j;
      const uint32_t source = per_source.quotient(i);
      const uint32_t at = i - source * per_source.value;
      // No source can send more; a wrong value must not lead out of the output.
      if (i < packets)
        (at == 0 ? source_rows[source] : begin[(at - 1) * (g.num_ranks + 1) + source + 1]) =
            min(value[j], g.max_tokens);
    }
    if (doubt) [[unlikely]] {
#pragma unroll 1
      for (uint32_t i = base, j = 0; j < kInFlight; ++j, i += kReaders) {
        if ((expected >> j & 1) == 0) continue;
        const uint32_t source = per_source.quotient(i);
        const uint32_t at = i - source * per_source.value;
        const uint64_t* packet =
            reinterpret_cast<const uint64_t*>(own + source * p.a.layout.counts_source_stride) + at;
        const uint32_t count = min(count_in_doubt(p, epoch, source, packet), g.max_tokens);
        (at == 0 ? source_rows[source] : begin[(at - 1) * (g.num_ranks + 1) + source + 1]) = count;
      }
    }
  }
  arch::bar_sync(kReadBarrier, kReaders);
#pragma unroll 1
  for (uint32_t l = thread; l < p.plan.local_experts.value; l += kReaders) {
    uint32_t* row = begin + l * (g.num_ranks + 1);
    uint32_t sum = 0;
    row[0] = 0;
#pragma unroll 1
    for (uint32_t r = 1; r <= g.num_ranks; ++r) row[r] = sum += row[r];
  }
  arch::mbarrier_arrive_release_cta(&shared_at<Fixed>(s.fixed)->placeable);
  arch::bar_sync(kReadBarrier, kReaders);
}

// What does not depend on rows. The readers of one block write it.
template <class P>
__device__ __forceinline__ void write_counts(const P& p, const Shared& s) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x - 32 * kFirstReader;
  const uint32_t* begin = shared_at<uint32_t>(s.begin);
  int32_t* count = reinterpret_cast<int32_t*>(p.a.recv_count);
  int64_t* range = reinterpret_cast<int64_t*>(p.a.layout_range);
  uint32_t* recv_rows = reinterpret_cast<uint32_t*>(p.a.handle.recv_rows);
#pragma unroll 1
  for (uint32_t i = thread; i < p.plan.local_experts.value * g.num_ranks; i += kReaders) {
    const uint32_t* at = begin + i / g.num_ranks * (g.num_ranks + 1) + i % g.num_ranks;
    range[i] = static_cast<int64_t>(uint64_t{at[0]} << 32 | (at[1] - at[0]));
  }
#pragma unroll 1
  for (uint32_t l = thread; l < p.plan.local_experts.value; l += kReaders)
    count[l] = static_cast<int32_t>(begin[l * (g.num_ranks + 1) + g.num_ranks]);
#pragma unroll 1
  for (uint32_t r = thread; r < g.num_ranks; r += kReaders)
    recv_rows[r] = shared_at<uint32_t>(s.source_rows)[r];
}

// Whether the readers are done.
__device__ __forceinline__ bool placeable(const Shared& s) {
  return arch::mbarrier_test_acquire_cta(&shared_at<Fixed>(s.fixed)->placeable, 0);
}

// Takes `kUnitLines` lines of one row and copies them to the row's places. One warp. The lines are
// polled before it is known whether the source sends such a row at all.
template <uint32_t H, bool FP8>
__device__ __forceinline__ void place_unit(const Problem<H, FP8>& p, const Shared& s,
                                           uint64_t epoch, uint32_t source, uint32_t slot,
                                           uint32_t first_line) {
  const ep_group& g = p.a.group;
  const LaneInLine lane;
  const RowShape shape = p.row();
  const uint32_t lines = shape.lines();
  const uint32_t header_lines = p.a.layout.header_lines;
  const uint32_t offset = lane.line * kLine + lane.piece * 16;
  const uint8_t* row = reinterpret_cast<const uint8_t*>(
                           p.rows_at(shared_at<uint64_t>(s.partners)[g.rank], source, epoch) +
                           slot * p.a.layout.row_stride) +
                       offset;
  bool certain = placeable(s);
  if (certain && slot >= shared_at<uint32_t>(s.source_rows)[source]) return;

  // Load everything at once; while something is missing, watch one epoch only, of the line that is
  // stored last: many warps wait here, and what they read while they wait, others cannot.
  const uint32_t unit_lines = min(lines - first_line, kUnitLines);
  const uint8_t* watched = reinterpret_cast<const uint8_t*>(
      p.rows_at(shared_at<uint64_t>(s.partners)[g.rank], source, epoch) +
      slot * p.a.layout.row_stride + (header_lines + first_line + unit_lines - 1) * kLine + kLine -
      sizeof(uint64_t));
  uint4 header = {};
  uint4 data[kLoads] = {};
  Patience patience;
  bool complete = false;
  bool over = false;
  while (!over) {
    if (lane.line < header_lines) header = arch::ld_relaxed_sys_v4(row);
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      const uint32_t line = i * kLinesPerWarp;
      if (line + lane.line < unit_lines)
        data[i] = arch::ld_relaxed_sys_v4(row + (header_lines + first_line + line) * kLine);
    }
    bool mine = lane.line >= header_lines || sealed(header, epoch);
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i)
      mine &= i * kLinesPerWarp + lane.line >= unit_lines || sealed(data[i], epoch);
    complete = __all_sync(~0u, mine || !lane.last());
    if (complete) break;
    do {
      if (!certain && __all_sync(~0u, placeable(s))) {
        certain = true;
        if (slot >= shared_at<uint32_t>(s.source_rows)[source]) return;
      }
      // Until the readers are done, their patience is what counts.
      if (certain && __any_sync(~0u, patience.expired(g, kDispatchRecv, epoch))) [[unlikely]] {
        if (threadIdx.x % 32 == 0) report_timeout(g, kDispatchRecv, epoch, EP_PHASE_ROWS, source);
        over = true;
      }
    } while (!over && arch::ld_relaxed_sys_u64(watched) != epoch);
  }
  if (!certain) {
    while (!placeable(s)) arch::sleep_ns(20);
    __syncwarp();
    if (slot >= shared_at<uint32_t>(s.source_rows)[source]) return;
  }

  auto map = [&] {
    return reinterpret_cast<uint64_t*>(p.a.handle.recv_map) +
           (uint64_t{source} * g.max_tokens + slot) * (1 + g.max_top_k);
  };
  if (!complete) {
    if (first_line == 0 && threadIdx.x % 32 == 0) map()[0] = 0;
    return;
  }

  // Lane e has entry e: where it goes, if it is one that this rank can place.
  const uint32_t thread = threadIdx.x % 32;
  const uint32_t token = __shfl_sync(~0u, header.x, 0);
  const uint32_t entries = min(__shfl_sync(~0u, header.y, 0), g.max_top_k);
  const uint32_t unit = 1 + thread;
  const uint32_t holder = unit / 15 * kLanesPerLine + unit % 15 / 2;
  const uint2 lower = {__shfl_sync(~0u, header.x, holder), __shfl_sync(~0u, header.y, holder)};
  const uint2 upper = {__shfl_sync(~0u, header.z, holder), __shfl_sync(~0u, header.w, holder)};
  const uint2 entry = unit % 15 % 2 != 0 ? upper : lower;
  const uint32_t expert = entry.x & (EP_MAX_LOCAL_EXPERTS - 1);
  uint32_t in_expert = kNowhere;
  if (thread < entries && expert < p.plan.local_experts.value) {
    const uint32_t* begin = shared_at<uint32_t>(s.begin) + expert * (g.num_ranks + 1) + source;
    if ((entry.x >> 16) < begin[1] - begin[0]) in_expert = begin[0] + (entry.x >> 16);
  }
  const uint32_t place = expert * p.rows_per_expert() + in_expert;
  uint32_t rest = __ballot_sync(~0u, in_expert != kNowhere);
  if (first_line == 0) {
    if (in_expert != kNowhere) {
      map()[1 + __popc(rest & ((1u << thread) - 1))] = uint64_t{entry.y} << 32 | place;
      reinterpret_cast<int32_t*>(p.a.src_info)[place] = static_cast<int32_t>(token);
    }
    if (thread == 0) map()[0] = uint64_t{static_cast<uint32_t>(__popc(rest))} << 32 | token;
  }

  // Where this lane's pieces stand in a row: load i is `step` bytes after load i - 1.
  const uint32_t line = first_line + lane.line;
  const uint32_t body_bytes = 16 * shape.body;
  const uint32_t start =
      lane.last() ? 16 * shape.whole() + 8 * (line - shape.scales) : 16 * (7 * line + lane.piece);
  const uint32_t end = lane.last() ? body_bytes : 16 * shape.whole();
  for (; rest != 0; rest &= rest - 1) {
    const int e = __ffs(rest) - 1;
    uint8_t* out = reinterpret_cast<uint8_t*>(p.a.recv_x) +
                   uint64_t{__shfl_sync(~0u, place, e)} * p.row_bytes() +
                   static_cast<int32_t>(start);
    if (!lane.last()) {
#pragma unroll
      for (uint32_t i = 0; i < kLoads; ++i)
        if (start + i * (kLinesPerWarp * 7 * 16) < end)
          *reinterpret_cast<uint4*>(out + i * (kLinesPerWarp * 7 * 16)) = data[i];
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kLoads; ++i)
        if (line + i * kLinesPerWarp >= shape.scales && start + i * (kLinesPerWarp * 8) < end)
          *reinterpret_cast<uint2*>(out + i * (kLinesPerWarp * 8)) = {data[i].x, data[i].y};
    }
    if (FP8 && first_line < shape.scales) {
      const uint64_t row_scales =
          p.a.recv_scales +
          4 * (uint64_t{__shfl_sync(~0u, expert, e) * p.scale_words() + 2 * line} *
                   p.rows_per_expert() +
               __shfl_sync(~0u, in_expert, e));
      if (lane.last()) {
#pragma unroll
        for (uint32_t i = 0; i < kLoads; ++i) {
          const uint32_t word = 2 * (line + i * kLinesPerWarp);
          uint32_t* scales = reinterpret_cast<uint32_t*>(row_scales) +
                             uint64_t{i * 2 * kLinesPerWarp} * p.rows_per_expert();
          if (word < p.scale_words()) scales[0] = data[i].x;
          if (word + 1 < p.scale_words()) scales[p.rows_per_expert()] = data[i].y;
        }
      }
    }
  }
}

// The placers' task. Sources take turns, because their rows arrive at the same time. Neighbouring
// units go to different blocks, so that few rows already use every multiprocessor.
template <class P>
__device__ __forceinline__ void place(const P& p, const Shared& s, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const uint32_t units_per_row = div_up(p.row().lines(), kUnitLines);
  uint32_t rows = g.max_tokens * g.num_ranks;
  bool certain = false;
  const uint32_t warp = threadIdx.x / 32 - kSenderWarps;
  for (uint32_t u = warp * gridDim.x + blockIdx.x;; u += kPlacerWarps * gridDim.x) {
    const uint32_t row = u / units_per_row;
    if (!certain && (certain = __all_sync(~0u, placeable(s)))) {
      uint32_t most = 0;
#pragma unroll 1
      for (uint32_t r = 0; r < g.num_ranks; ++r)
        most = max(most, shared_at<uint32_t>(s.source_rows)[r]);
      rows = most * g.num_ranks;
    }
    if (row >= rows) break;
    const uint32_t source = (row + g.rank) % g.num_ranks;
    if (shared_at<uint64_t>(s.partners)[source] == 0) continue;
    place_unit(p, s, epoch, source, row / g.num_ranks, u % units_per_row * kUnitLines);
  }
}

template <uint32_t H, bool FP8>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch(const __grid_constant__ ep_dispatch_args args, const __grid_constant__ Plan plan) {
  const Problem<H, FP8> p(args, plan);
  const ep_group& g = args.group;
  const Control control(g);
  const Shared& s = plan.shared;
  Fixed* fixed = shared_at<Fixed>(s.fixed);
  const bool sends = (args.flags & EP_DISPATCH_SEND) != 0;
  const bool receives = (args.flags & EP_DISPATCH_RECV) != 0;
  const uint32_t warp = threadIdx.x / 32;

  // Everything that all warps need is loaded at once, by warps that have nothing else to load.
  if (warp == kFirstReader) {
    const uint32_t lane = threadIdx.x % 32;
    uint64_t epoch = 0;
    if (lane == 0) epoch = epoch_of(control, kDispatchSend);
    if (lane == 1) epoch = epoch_of(control, kDispatchRecv);
#pragma unroll 1
    for (uint32_t r = lane; r < g.num_ranks; r += 32)
      shared_at<uint64_t>(s.partners)[r] = partner_base(g, control, r);
    if (lane == 0) fixed->send_epoch = epoch;
    if (lane == 1) fixed->recv_epoch = epoch;
    if (lane == 2) arch::mbarrier_init(&fixed->placeable, kReaders);
  }
  auto meet = [] { arch::bar_sync(kMeetBarrier, kThreads); };
  if (warp < kSenderWarps) {
    if (sends) return send(p, s, meet);
    meet();
  } else if (warp == kRouterWarp) {
    if (sends) return route(p, s, meet);
    meet();
  } else {
    meet();
    if (warp == kRouterWarp - 1) {
      if (threadIdx.x % 32 == 0 && sends) advance(control, kDispatchSend, fixed->send_epoch);
      if (threadIdx.x % 32 == 1 && receives) advance(control, kDispatchRecv, fixed->recv_epoch);
      __syncwarp();
    }
    if (!receives) return;
    if (warp < kRouterWarp) return place(p, s, fixed->recv_epoch);
    read_counts(p, s, fixed->recv_epoch);
    if (blockIdx.x == 0) write_counts(p, s);
  }
}

using DispatchKernel = void(const ep_dispatch_args, const Plan);

template <bool FP8>
DispatchKernel* kernel_for(uint32_t hidden) {
  switch (hidden) {
  case 3584: return dispatch<3584, FP8>;
  case 7168: return dispatch<7168, FP8>;
  default: return dispatch<0, FP8>;
  }
}

bool is_sound(const ep_dispatch_args& a) {
  constexpr uint32_t kParts = EP_DISPATCH_SEND | EP_DISPATCH_RECV;
  constexpr uint32_t kFlags =
      kParts | EP_DISPATCH_FP8 | EP_DISPATCH_WEIGHTS | EP_DISPATCH_POW2 | EP_DISPATCH_UE8M0;
  if (a.struct_size != sizeof(a) || (a.flags & kParts) == 0 || !group_is_sound(a.group) ||
      !handle_is_sound(a.handle, a.group, a.layout))
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
  return load(dispatch<3584, false>, dispatch<3584, true>, dispatch<7168, false>,
              dispatch<7168, true>, dispatch<0, false>, dispatch<0, true>);
}

extern "C" int32_t ep_dispatch_launch(const ep_dispatch_args* args, void* stream,
                                      int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || !is_sound(*args)) return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->group.device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  const bool fp8 = (args->flags & EP_DISPATCH_FP8) != 0;
  DispatchKernel* kernel =
      fp8 ? kernel_for<true>(args->group.hidden) : kernel_for<false>(args->group.hidden);
  unsigned grid = 0;
  cudaError_t e = grid_for(args->group, &grid);
  if (e != cudaSuccess) return status_of(e, cuda_error);
  const Plan plan(*args, fp8, grid);
  e = allow_shared(kernel, plan.shared.bytes);
  if (e == cudaSuccess) {
    kernel<<<grid, kThreads, plan.shared.bytes, static_cast<cudaStream_t>(stream)>>>(*args, plan);
    e = cudaGetLastError();
  }
  return status_of(e, cuda_error);
}
