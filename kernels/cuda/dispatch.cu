// Dispatch: every token once to each rank that owns one of its experts, spread there over the experts.
//
// A block has two halves that never wait for each other. The sending half takes tokens: it counts the
// entries before them (a slot is a prefix sum in token order, so the same input gives the same bits),
// quantises, and stores whole lines to the peers. One block's sending half first tells every rank its
// counts. The receiving half places rows: it reads all sources' counts, sums them, and copies each row
// from the lines to its experts' places as the lines arrive. No block waits for another block.

#include <cuda_bf16.h>

#include "arch/fp8.cuh"
#include "group.cuh"
#include "launch.cuh"
#include "line.cuh"

namespace ep {
namespace {

constexpr uint32_t kSendThreads = 512;
constexpr uint32_t kRecvThreads = 512;
constexpr uint32_t kSendWarps = kSendThreads / 32;
constexpr uint32_t kRecvWarps = kRecvThreads / 32;
constexpr uint32_t kSendBarrier = 1;
constexpr uint32_t kRecvBarrier = 2;
constexpr uint32_t kBatch = 4;            // tokens routed at once
constexpr uint32_t kLoads = 4;            // line loads in flight per lane and unit of receiving
constexpr uint32_t kUnitLines = kLoads * kLinesPerWarp;
constexpr uint32_t kNowhere = ~0u;
constexpr uint32_t kChannelsPerScale = 128;

// Offsets of what a block keeps in its dynamic shared memory.
struct Shared {
  // Receiving half.
  uint32_t source_rows;  // u32 [R] rows from each source
  uint32_t begin;        // u32 [L][R + 1] first row of each source
  // Sending half.
  uint32_t rank_rows;     // u32 [R] rows for each rank so far
  uint32_t expert_rows;   // u32 [E] entries of each expert so far
  uint32_t destinations;  // u32 [kBatch] how many
  uint32_t row_base;      // u64 [kBatch][D] where a token's row goes at each of its destinations
  uint32_t header;        // u64 [kBatch][D][1 + K]
  uint32_t scales;        // u32 [2][scale_stride]
  uint32_t body;          // u8 [2][H] quantised rows
  uint32_t bytes;

  __host__ __device__ Shared(const ep_group& g, uint32_t top_k, uint32_t hidden, bool fp8) {
    const uint32_t d = max_destinations(g, top_k);
    source_rows = 0;
    begin = align16(source_rows + 4 * g.num_ranks);
    rank_rows = align16(begin + 4 * (g.num_experts / g.num_ranks) * (g.num_ranks + 1));
    expert_rows = align16(rank_rows + 4 * g.num_ranks);
    destinations = align16(expert_rows + 4 * g.num_experts);
    row_base = destinations + 4 * kBatch;
    header = row_base + 8 * kBatch * d;
    scales = align16(header + 8 * kBatch * d * (1 + top_k));
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

// What both halves derive from the arguments. H is the hidden size where it is known at compile time.
template <uint32_t H, bool FP8>
struct Problem {
  const ep_dispatch_args& a;
  uint32_t local_experts;

  __device__ __forceinline__ explicit Problem(const ep_dispatch_args& args)
      : a(args), local_experts(args.group.num_experts / args.group.num_ranks) {}

  __device__ __forceinline__ uint32_t hidden() const { return H != 0 ? H : a.group.hidden; }
  __device__ __forceinline__ bool ue8m0() const { return FP8 && (a.flags & EP_DISPATCH_UE8M0) != 0; }
  __device__ __forceinline__ uint32_t scale_words() const {
    return !FP8 ? 0 : ue8m0() ? div_up(hidden(), 4 * kChannelsPerScale) : hidden() / kChannelsPerScale;
  }
  __device__ __forceinline__ RowShape row() const {
    return {hidden() / (FP8 ? 16 : 8), div_up(scale_words(), 2)};
  }
  __device__ __forceinline__ uint32_t row_bytes() const { return hidden() * (FP8 ? 1 : 2); }
  // All rows together are fewer than 2^31 (ep_layout's maker checks it).
  __device__ __forceinline__ uint32_t rows_per_expert() const { return a.group.num_ranks * a.group.max_tokens; }
  // Where `source`'s part of this epoch's counts and rows stands in the buffer at `base`.
  __device__ __forceinline__ uint64_t counts_at(uint64_t base, uint32_t source, uint64_t epoch) const {
    return base + a.layout.counts + epoch % a.layout.ring * a.layout.counts_ring_stride +
           source * a.layout.counts_source_stride;
  }
  __device__ __forceinline__ uint64_t rows_at(uint64_t base, uint32_t source, uint64_t epoch) const {
    return base + a.layout.rows + epoch % a.layout.ring * a.layout.rows_ring_stride +
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
      : width(power_of_two(top_k)), token((threadIdx.x % 32) / width), k((threadIdx.x % 32) % width) {}
  __device__ __forceinline__ uint32_t tokens_per_warp() const { return 32 / width; }
};

enum Entry : uint32_t { kNone, kValid, kOutOfRange, kRepeated };

// Classifies the entry of each lane; all lanes of the warp take part. Lanes without an entry pass -1.
__device__ __forceinline__ Entry classify(int64_t id, uint32_t num_experts, uint32_t token) {
  const bool in_range = id >= 0 && id < static_cast<int64_t>(num_experts);
  const uint32_t lane = threadIdx.x % 32;
  // Entries that are no experts match nobody.
  const uint32_t key = in_range ? token * EP_MAX_EXPERTS + static_cast<uint32_t>(id) : ~lane;
  const uint32_t same = __match_any_sync(~0u, key);
  if (!in_range) return id == -1 ? kNone : kOutOfRange;
  return (same & ((1u << lane) - 1)) != 0 ? kRepeated : kValid;
}

// Lanes of the same token whose valid entry has the same owner; 0 for lanes without a valid entry.
__device__ __forceinline__ uint32_t same_owner(bool valid, uint32_t token, uint32_t owner) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t same = __match_any_sync(~0u, valid ? token * EP_MAX_RANKS + owner : ~lane);
  return valid ? same : 0;
}

// Adds the entries of tokens [from, to) to the running counts. All sending threads call it.
template <class P>
__device__ __forceinline__ void count_entries(const P& p, const Shared& s, uint32_t from, uint32_t to) {
  const uint32_t top_k = p.a.handle.top_k;
  const EntryLane e(top_k);
  const uint32_t warp = threadIdx.x / 32;
  const int64_t* ids = reinterpret_cast<const int64_t*>(p.a.topk_idx);
  const uint32_t step = kSendWarps * e.tokens_per_warp();
  auto load = [&](uint32_t base) -> int64_t {
    const uint32_t t = base + warp * e.tokens_per_warp() + e.token;
    return t < to && e.k < top_k ? ids[uint64_t{t} * top_k + e.k] : -1;
  };
  int64_t next = load(from);
  for (uint32_t base = from; base < to; base += step) {
    const int64_t id = next;
    next = load(base + step);
    const bool valid = classify(id, p.a.group.num_experts, e.token) == kValid;
    const uint32_t expert = valid ? static_cast<uint32_t>(id) : 0;
    const uint32_t owner = expert / p.local_experts;
    const uint32_t same = same_owner(valid, e.token, owner);
    if (valid) {
      atomicAdd(&shared_at<uint32_t>(s.expert_rows)[expert], 1);
      if (__ffs(same) - 1 == static_cast<int>(threadIdx.x % 32)) atomicAdd(&shared_at<uint32_t>(s.rank_rows)[owner], 1);
    }
  }
}

__device__ __forceinline__ void clear_counts(const Shared& s, const ep_group& g) {
  for (uint32_t i = threadIdx.x; i < g.num_ranks; i += kSendThreads) shared_at<uint32_t>(s.rank_rows)[i] = 0;
  for (uint32_t i = threadIdx.x; i < g.num_experts; i += kSendThreads) shared_at<uint32_t>(s.expert_rows)[i] = 0;
}

// Tells every rank how many rows it gets, and how many of them go to each of its experts.
template <class P>
__device__ __forceinline__ void send_counts(const P& p, const Shared& s, const Control& control, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const uint32_t per_rank = p.local_experts + 1;
  for (uint32_t i = threadIdx.x; i < g.num_ranks * per_rank; i += kSendThreads) {
    const uint32_t rank = i / per_rank;
    const uint32_t at = i % per_rank;
    if (!takes_part(g, control, rank)) continue;
    const uint32_t value = at == 0 ? shared_at<uint32_t>(s.rank_rows)[rank] : shared_at<uint32_t>(s.expert_rows)[rank * p.local_experts + at - 1];
    uint64_t* to = reinterpret_cast<uint64_t*>(p.counts_at(peer_base(g, rank), g.rank, epoch)) + at;
    arch::st_relaxed_sys_u64(to, packet(value, epoch));
  }
}

// Routes one token: slots, positions, header and destinations. One warp; K lanes have an entry.
template <class P>
__device__ __forceinline__ void route_token(const P& p, const Shared& s, const Control& control, uint64_t epoch,
                                            uint32_t token, uint32_t in_batch, int64_t id) {
  const ep_group& g = p.a.group;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t top_k = p.a.handle.top_k;
  const Entry kind = classify(id, g.num_experts, 0);
  if (kind == kOutOfRange || kind == kRepeated)
    record_fault(g, kDispatchSend, epoch, kind == kOutOfRange ? EP_FAULT_EXPERT_RANGE : EP_FAULT_EXPERT_REPEATED,
                 EP_PHASE_SEND, g.rank, token, id);
  const bool valid = kind == kValid;
  const uint32_t expert = valid ? static_cast<uint32_t>(id) : 0;
  const uint32_t owner = expert / p.local_experts;
  const uint32_t same = same_owner(valid, 0, owner);
  const bool leads = valid && __ffs(same) - 1 == static_cast<int>(lane);
  const bool reachable = valid && takes_part(g, control, owner);

  uint32_t slot = 0;
  if (leads) slot = shared_at<uint32_t>(s.rank_rows)[owner]++;
  slot = __shfl_sync(~0u, slot, same != 0 ? __ffs(same) - 1 : 0);
  uint32_t position = 0;
  if (valid) position = shared_at<uint32_t>(s.expert_rows)[expert]++;
  if (leads && peer_base(g, owner) == 0)
    record_peer_fault(g, kDispatchSend, epoch, EP_FAULT_UNREACHABLE, EP_PHASE_SEND, owner, token);

  // Destinations in the order of ranks after this one, so that at any time ranks send to different
  // ones; the header's entries in top-k order.
  const uint32_t turn = (owner + g.num_ranks - g.rank - 1) % g.num_ranks;
  uint32_t index = 0;
  const uint32_t leaders = __ballot_sync(~0u, leads && reachable);
  for (uint32_t rest = leaders; rest != 0; rest &= rest - 1) {
    const uint32_t other = __shfl_sync(~0u, turn, __ffs(rest) - 1);
    index += other < turn;
  }
  const uint32_t max_destinations = Shared::max_destinations(g, top_k);
  uint64_t* header = shared_at<uint64_t>(s.header) + (in_batch * max_destinations + index) * (1 + top_k);
  if (reachable) {
    const float* weights = reinterpret_cast<const float*>(p.a.topk_weights);
    const float weight =
        (p.a.flags & EP_DISPATCH_WEIGHTS) != 0 ? weights[uint64_t{token} * top_k + lane] : 1.0f;
    const uint32_t at = __popc(same & ((1u << lane) - 1));
    header[1 + at] = uint64_t{__float_as_uint(weight)} << 32 | position << 16 | lane << 11 | expert % p.local_experts;
    if (leads) {
      header[0] = uint64_t{static_cast<uint32_t>(__popc(same))} << 32 | token;
      shared_at<uint64_t>(s.row_base)[in_batch * max_destinations + index] =
          p.rows_at(peer_base(g, owner), g.rank, epoch) + slot * p.a.layout.row_stride;
    }
  }
  if (lane == 0) shared_at<uint32_t>(s.destinations)[in_batch] = __popc(leaders);
  if (lane < top_k) {
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
  return {__uint_as_float((254 - exponent) << 23), __uint_as_float(exponent << 23)};
}

__device__ __forceinline__ float2 bf16x2_to_float2(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}

// Quantises a token into shared memory. A thread has 16 channels, eight threads share a scale.
template <class P>
__device__ __forceinline__ void quantise(const P& p, uint32_t token, uint8_t* body, uint32_t* scales) {
  const uint8_t* x = reinterpret_cast<const uint8_t*>(p.a.x) + uint64_t{token} * p.hidden() * 2;
  const uint32_t groups = p.hidden() / 16;
  const bool pow2 = (p.a.flags & EP_DISPATCH_POW2) != 0;
  for (uint32_t base = 0; base < groups; base += kSendThreads) {
    const uint32_t i = base + threadIdx.x;
    const bool mine = i < groups;
    uint4 half[2] = {};
    if (mine) {
      half[0] = arch::ld_stream_v4(x + 32 * i);
      half[1] = arch::ld_stream_v4(x + 32 * i + 16);
    }
    const uint32_t word[8] = {half[0].x, half[0].y, half[0].z, half[0].w, half[1].x, half[1].y, half[1].z, half[1].w};
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
    if (mine) {
      reinterpret_cast<uint4*>(body)[i] = {q[0], q[1], q[2], q[3]};
      if (i % 8 == 0) {
        if (p.ue8m0())
          reinterpret_cast<uint8_t*>(scales)[i / 8] = static_cast<uint8_t>(__float_as_uint(scale.inverse) >> 23);
        else
          scales[i / 8] = __float_as_uint(scale.inverse);
      }
    }
  }
}

// The piece of a line that this lane carries, from the token's row.
template <bool FP8, class P>
__device__ __forceinline__ uint4 piece_of(const P& p, const RowShape& shape, const uint8_t* body, const uint32_t* scales,
                                          uint32_t line, const LaneInLine& lane, uint64_t epoch) {
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

// Stores one routed token to its destinations.
template <bool FP8, class P>
__device__ __forceinline__ void send_token(const P& p, const Shared& s, uint32_t in_batch, const uint8_t* body,
                                           const uint32_t* scales, uint64_t epoch) {
  const uint32_t warp = threadIdx.x / 32;
  const LaneInLine lane;
  const uint32_t top_k = p.a.handle.top_k;
  const uint32_t max_destinations = Shared::max_destinations(p.a.group, top_k);
  const uint32_t destinations = shared_at<uint32_t>(s.destinations)[in_batch];
  const uint64_t* row_base = shared_at<uint64_t>(s.row_base) + in_batch * max_destinations;
  const uint32_t header_lines = p.a.layout.header_lines;
  const uint32_t offset = lane.line * kLine + lane.piece * 16;

  for (uint32_t d = warp; d < destinations; d += kSendWarps) {
    const uint64_t* header = shared_at<uint64_t>(s.header) + (in_batch * max_destinations + d) * (1 + top_k);
    const uint32_t entries = static_cast<uint32_t>(header[0] >> 32);
    if (lane.line < header_lines) {
      const uint32_t unit = lane.line * 15 + lane.piece * 2;
      const uint64_t lo = unit <= entries ? header[unit] : 0;
      const uint64_t hi = unit + 1 <= entries ? header[unit + 1] : 0;
      const uint2 first = {static_cast<uint32_t>(lo), static_cast<uint32_t>(lo >> 32)};
      const uint4 piece = lane.last() ? seal(first, epoch)
                                      : uint4{first.x, first.y, static_cast<uint32_t>(hi), static_cast<uint32_t>(hi >> 32)};
      arch::st_relaxed_sys_v4(reinterpret_cast<uint8_t*>(row_base[d]) + offset, piece);
    }
  }

  const RowShape shape = p.row();
  const uint32_t lines = shape.lines();
  for (uint32_t base = warp * kLinesPerWarp; base < lines; base += kSendWarps * kLinesPerWarp) {
    const uint32_t line = base + lane.line;
    if (line >= lines) continue;
    const uint4 piece = piece_of<FP8>(p, shape, body, scales, line, lane, epoch);
    for (uint32_t d = 0; d < destinations; ++d)
      arch::st_relaxed_sys_v4(reinterpret_cast<uint8_t*>(row_base[d]) + (header_lines + base) * kLine + offset, piece);
  }
}

template <uint32_t H, bool FP8>
__device__ __forceinline__ void send(const Problem<H, FP8>& p, const Shared& s) {
  __shared__ uint64_t shared_epoch;
  const ep_group& g = p.a.group;
  const Control control(g);
  const uint32_t tokens = p.a.handle.num_tokens;
  const uint32_t top_k = p.a.handle.top_k;
  if (threadIdx.x == 0) shared_epoch = begin_part(control, kDispatchSend);

  clear_counts(s, g);
  if (FP8)
    for (uint32_t i = threadIdx.x; i < 2 * Shared::scale_stride(p.hidden()); i += kSendThreads) shared_at<uint32_t>(s.scales)[i] = 0;
  arch::bar_sync(kSendBarrier, kSendThreads);
  const uint64_t epoch = shared_epoch;

  // The last block is the one that most often has no token.
  if (blockIdx.x == gridDim.x - 1) {
    count_entries(p, s, 0, tokens);
    arch::bar_sync(kSendBarrier, kSendThreads);
    send_counts(p, s, control, epoch);
    arch::bar_sync(kSendBarrier, kSendThreads);
    clear_counts(s, g);
    arch::bar_sync(kSendBarrier, kSendThreads);
  }

  const uint32_t chunk = div_up(tokens, gridDim.x);
  const uint32_t from = blockIdx.x * chunk;
  const uint32_t to = from + chunk < tokens ? from + chunk : tokens;
  if (from >= to) return;

  count_entries(p, s, 0, from);
  const int64_t* ids = reinterpret_cast<const int64_t*>(p.a.topk_idx);
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t batch = from; batch < to; batch += kBatch) {
    arch::bar_sync(kSendBarrier, kSendThreads);
    const uint32_t size = to - batch < kBatch ? to - batch : kBatch;
    if (threadIdx.x < 32) {
      int64_t id[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i)
        id[i] = i < size && lane < top_k ? ids[uint64_t{batch + i} * top_k + lane] : -1;
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i)
        if (i < size) route_token(p, s, control, epoch, batch + i, i, id[i]);
    }
    for (uint32_t i = 0; i < size; ++i) {
      if (FP8) {
        // Two buffers: while some warps still send one token, others quantise the next.
        uint8_t* body = shared_at<uint8_t>(s.body) + i % 2 * p.hidden();
        uint32_t* scales = shared_at<uint32_t>(s.scales) + i % 2 * Shared::scale_stride(p.hidden());
        quantise(p, batch + i, body, scales);
        arch::bar_sync(kSendBarrier, kSendThreads);
        send_token<FP8>(p, s, i, body, scales, epoch);
      } else {
        if (i == 0) arch::bar_sync(kSendBarrier, kSendThreads);
        const uint8_t* x = reinterpret_cast<const uint8_t*>(p.a.x) + uint64_t{batch + i} * p.hidden() * 2;
        send_token<FP8>(p, s, i, x, nullptr, epoch);
      }
    }
  }
}

// Reads all sources' counts and leaves in shared memory where each source's rows begin.
template <class P>
__device__ __forceinline__ void receive_counts(const P& p, const Shared& s, const Control& control, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x - kSendThreads;
  const uint32_t per_source = p.local_experts + 1;
  const uint64_t own = peer_base(g, g.rank);
  for (uint32_t i = thread; i < g.num_ranks * per_source; i += kRecvThreads) {
    const uint32_t source = i / per_source;
    const uint32_t at = i % per_source;
    uint32_t value = 0;
    if (takes_part(g, control, source)) {
      const uint64_t* from = reinterpret_cast<const uint64_t*>(p.counts_at(own, source, epoch)) + at;
      const uint64_t* verdict = control.verdict(kDispatchRecv, source);
      Patience patience;
      uint64_t seen;
      bool present = true;
      for (;;) {
        seen = arch::ld_relaxed_sys_u64(from);
        const uint64_t word = arch::ld_relaxed_gpu_u64(verdict);
        if (packet_is(seen, epoch) && is_open(word, epoch)) break;
        if (!is_open(word, epoch) || patience.expired(g, kDispatchRecv, epoch)) {
          present = decide_present(g, kDispatchRecv, epoch, source, from);
          if (!present) report_timeout(g, kDispatchRecv, epoch, EP_PHASE_COUNTS, source);
          // Counts of a present source arrive together, so that a missing one is a matter of moments.
          seen = arch::ld_acquire_sys_u64(from);
          break;
        }
      }
      if (present && packet_is(seen, epoch)) value = static_cast<uint32_t>(seen);
      // No source can send more; a wrong value must not lead out of the output.
      if (value > g.max_tokens) value = g.max_tokens;
    }
    if (at == 0)
      shared_at<uint32_t>(s.source_rows)[source] = value;
    else
      shared_at<uint32_t>(s.begin)[(at - 1) * (g.num_ranks + 1) + source + 1] = value;
  }
  arch::bar_sync(kRecvBarrier, kRecvThreads);
  for (uint32_t l = thread; l < p.local_experts; l += kRecvThreads) {
    uint32_t* begin = shared_at<uint32_t>(s.begin) + l * (g.num_ranks + 1);
    uint32_t sum = 0;
    begin[0] = 0;
    for (uint32_t r = 1; r <= g.num_ranks; ++r) begin[r] = sum += begin[r];
  }
  arch::bar_sync(kRecvBarrier, kRecvThreads);
}

// What does not depend on rows: one block writes it.
template <class P>
__device__ __forceinline__ void write_counts(const P& p, const Shared& s) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x - kSendThreads;
  int32_t* count = reinterpret_cast<int32_t*>(p.a.recv_count);
  int64_t* range = reinterpret_cast<int64_t*>(p.a.layout_range);
  uint32_t* recv_rows = reinterpret_cast<uint32_t*>(p.a.handle.recv_rows);
  for (uint32_t i = thread; i < p.local_experts * g.num_ranks; i += kRecvThreads) {
    const uint32_t* begin = shared_at<uint32_t>(s.begin) + i / g.num_ranks * (g.num_ranks + 1) + i % g.num_ranks;
    range[i] = static_cast<int64_t>(uint64_t{begin[0]} << 32 | (begin[1] - begin[0]));
  }
  for (uint32_t l = thread; l < p.local_experts; l += kRecvThreads)
    count[l] = static_cast<int32_t>(shared_at<uint32_t>(s.begin)[l * (g.num_ranks + 1) + g.num_ranks]);
  for (uint32_t r = thread; r < g.num_ranks; r += kRecvThreads) recv_rows[r] = shared_at<uint32_t>(s.source_rows)[r];
}

// Receives `kUnitLines` lines of one row and copies them to the row's places. One warp.
template <uint32_t H, bool FP8>
__device__ __forceinline__ void receive_unit(const Problem<H, FP8>& p, const Shared& s, uint64_t epoch, uint32_t source,
                                             uint32_t slot, uint32_t first_line) {
  const ep_group& g = p.a.group;
  const LaneInLine lane;
  const RowShape shape = p.row();
  const uint32_t lines = shape.lines();
  const uint32_t header_lines = p.a.layout.header_lines;
  const uint8_t* row = reinterpret_cast<const uint8_t*>(p.rows_at(peer_base(g, g.rank), source, epoch) +
                                                        slot * p.a.layout.row_stride);
  const uint32_t offset = lane.line * kLine + lane.piece * 16;
  const bool first = first_line == 0;

  // Bit i: load i is complete in all lanes; bit kLoads: the header is.
  constexpr uint32_t kHeader = 1u << kLoads;
  uint32_t missing = kHeader;
#pragma unroll
  for (uint32_t i = 0; i < kLoads; ++i)
    if (first_line + i * kLinesPerWarp < lines) missing |= 1u << i;
  uint4 header = {};
  uint4 data[kLoads] = {};
  Patience patience;
  while (missing != 0) {
    if ((missing & kHeader) != 0 && lane.line < header_lines) header = arch::ld_relaxed_sys_v4(row + offset);
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      const uint32_t line = first_line + i * kLinesPerWarp;
      if ((missing >> i & 1) != 0 && line + lane.line < lines)
        data[i] = arch::ld_relaxed_sys_v4(row + (header_lines + line) * kLine + offset);
    }
    if ((missing & kHeader) != 0 &&
        __all_sync(~0u, !lane.last() || lane.line >= header_lines || sealed(header, epoch)))
      missing &= ~kHeader;
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      const uint32_t line = first_line + i * kLinesPerWarp + lane.line;
      if ((missing >> i & 1) != 0 && __all_sync(~0u, !lane.last() || line >= lines || sealed(data[i], epoch)))
        missing &= ~(1u << i);
    }
    if (missing != 0) {
      const bool over = patience.expired(g, kDispatchRecv, epoch);
      if (__any_sync(~0u, over)) {
        if (threadIdx.x % 32 == 0) report_timeout(g, kDispatchRecv, epoch, EP_PHASE_ROWS, source);
        break;
      }
    }
  }

  uint64_t* map = reinterpret_cast<uint64_t*>(p.a.handle.recv_map) +
                  (uint64_t{source} * g.max_tokens + slot) * (1 + g.max_top_k);
  const bool writes_map = first && threadIdx.x % 32 == 0;
  if (missing != 0) {
    if (writes_map) map[0] = 0;
    return;
  }

  const uint32_t token = __shfl_sync(~0u, header.x, 0);
  uint32_t entries = __shfl_sync(~0u, header.y, 0);
  if (entries > g.max_top_k) entries = g.max_top_k;
  uint32_t kept = 0;
  for (uint32_t e = 1; e <= entries; ++e) {
    const uint32_t from = e / 15 * kLanesPerLine + e % 15 / 2;
    const bool upper = e % 15 % 2 != 0;
    const uint32_t where = __shfl_sync(~0u, upper ? header.z : header.x, from);
    const uint32_t weight = __shfl_sync(~0u, upper ? header.w : header.y, from);
    const uint32_t expert = where & (EP_MAX_LOCAL_EXPERTS - 1);
    const uint32_t position = where >> 16;
    if (expert >= p.local_experts) continue;
    const uint32_t* begin = shared_at<uint32_t>(s.begin) + expert * (g.num_ranks + 1) + source;
    if (position >= begin[1] - begin[0]) continue;
    const uint32_t in_expert = begin[0] + position;
    const uint32_t place = expert * p.rows_per_expert() + in_expert;
    uint8_t* out = reinterpret_cast<uint8_t*>(p.a.recv_x) + uint64_t{place} * p.row_bytes();
#pragma unroll
    for (uint32_t i = 0; i < kLoads; ++i) {
      const uint32_t line = first_line + i * kLinesPerWarp + lane.line;
      if (line >= lines) continue;
      if (!lane.last()) {
        const uint32_t unit = 7 * line + lane.piece;
        if (unit < shape.whole()) reinterpret_cast<uint4*>(out)[unit] = data[i];
      } else if (line < shape.scales) {
        uint32_t* scales = reinterpret_cast<uint32_t*>(p.a.recv_scales) +
                           uint64_t{expert * p.scale_words() + 2 * line} * p.rows_per_expert() + in_expert;
        scales[0] = data[i].x;
        if (2 * line + 1 < p.scale_words()) scales[p.rows_per_expert()] = data[i].y;
      } else {
        const uint32_t at = 16 * shape.whole() + 8 * (line - shape.scales);
        if (at < 16 * shape.body) *reinterpret_cast<uint2*>(out + at) = {data[i].x, data[i].y};
      }
    }
    ++kept;
    if (writes_map) {
      map[kept] = uint64_t{weight} << 32 | place;
      reinterpret_cast<int32_t*>(p.a.src_info)[place] = static_cast<int32_t>(token);
    }
  }
  if (writes_map) map[0] = uint64_t{kept} << 32 | token;
}

template <uint32_t H, bool FP8>
__device__ __forceinline__ void receive(const Problem<H, FP8>& p, const Shared& s) {
  __shared__ uint64_t shared_epoch;
  const ep_group& g = p.a.group;
  const Control control(g);
  if (threadIdx.x == kSendThreads) shared_epoch = begin_part(control, kDispatchRecv);
  arch::bar_sync(kRecvBarrier, kRecvThreads);
  const uint64_t epoch = shared_epoch;

  receive_counts(p, s, control, epoch);
  if (blockIdx.x == 0) write_counts(p, s);

  // Sources take turns, because their rows arrive at the same time. Neighbouring units go to
  // different blocks, so that few rows already use every multiprocessor.
  uint32_t most = 0;
  for (uint32_t r = 0; r < g.num_ranks; ++r) most = max(most, shared_at<uint32_t>(s.source_rows)[r]);
  const uint32_t units_per_row = div_up(p.row().lines(), kUnitLines);
  const uint32_t units = most * g.num_ranks * units_per_row;
  const uint32_t warp = (threadIdx.x - kSendThreads) / 32;
  for (uint32_t u = warp * gridDim.x + blockIdx.x; u < units; u += kRecvWarps * gridDim.x) {
    const uint32_t row = u / units_per_row;
    const uint32_t source = (row + g.rank) % g.num_ranks;
    const uint32_t slot = row / g.num_ranks;
    if (slot < shared_at<uint32_t>(s.source_rows)[source])
      receive_unit(p, s, epoch, source, slot, u % units_per_row * kUnitLines);
  }
}

template <uint32_t H, bool FP8>
__global__ void __launch_bounds__(kSendThreads + kRecvThreads, 1)
    dispatch(const __grid_constant__ ep_dispatch_args args) {
  const Problem<H, FP8> p(args);
  const Shared s(args.group, args.handle.top_k, p.hidden(), FP8);
  if (threadIdx.x < kSendThreads) {
    if ((args.flags & EP_DISPATCH_SEND) != 0) send(p, s);
  } else {
    if ((args.flags & EP_DISPATCH_RECV) != 0) receive(p, s);
  }
}

using DispatchKernel = void(const ep_dispatch_args);

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
  if (a.struct_size != sizeof(a) || (a.flags & kParts) == 0 || !group_is_sound(a.group) ||
      !handle_is_sound(a.handle, a.group, a.layout))
    return false;
  if ((a.flags & EP_DISPATCH_SEND) != 0 && a.handle.num_tokens != 0 && (a.x == 0 || a.topk_idx == 0)) return false;
  if ((a.flags & EP_DISPATCH_WEIGHTS) != 0 && a.handle.num_tokens != 0 && a.topk_weights == 0) return false;
  if ((a.flags & EP_DISPATCH_UE8M0) != 0 && (a.flags & EP_DISPATCH_POW2) == 0) return false;
  return (a.flags & EP_DISPATCH_RECV) == 0 ||
         (a.recv_x != 0 && a.recv_count != 0 && a.src_info != 0 && a.layout_range != 0 &&
          ((a.flags & EP_DISPATCH_FP8) == 0 || a.recv_scales != 0));
}

}  // namespace
}  // namespace ep

extern "C" uint32_t ep_kernels_abi_version(void) { return EP_KERNELS_ABI_VERSION; }

extern "C" int32_t ep_dispatch_launch(const ep_dispatch_args* args, void* stream, int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || !is_sound(*args)) return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->group.device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  const bool fp8 = (args->flags & EP_DISPATCH_FP8) != 0;
  DispatchKernel* kernel = fp8 ? kernel_for<true>(args->group.hidden) : kernel_for<false>(args->group.hidden);
  const size_t shared = Shared(args->group, args->handle.top_k, args->group.hidden, fp8).bytes;
  unsigned grid = 0;
  cudaError_t e = grid_for(args->group, &grid);
  if (e == cudaSuccess) e = allow_shared(kernel, shared);
  if (e == cudaSuccess) {
    kernel<<<grid, kSendThreads + kRecvThreads, shared, static_cast<cudaStream_t>(stream)>>>(*args);
    e = cudaGetLastError();
  }
  return status_of(e, cuda_error);
}
