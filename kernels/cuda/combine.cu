// Combine: the owner of a token's experts reduces its rows to one partial and pushes it back; the
// token's rank sums the partials.
//
// Every warp first sends, walking the rows that were received, then receives, walking the tokens
// that were sent: what others wait for comes first, and nobody polls while there is something to
// send. If the weights are given only here, they are pushed to the owners before anything else.
// Blocks wait for each other as for other ranks: for what they send.

#include <cuda_bf16.h>

#include <type_traits>

#include "arch/predicated.cuh"
#include "arch/shared.cuh"
#include "divisor.cuh"
#include "group.cuh"
#include "launch.cuh"
#include "line.cuh"

namespace ep {
namespace {

constexpr uint32_t kNowhere = ~0u;
constexpr uint32_t kNothing = 0x80008000;  // -0 twice: what is added to it stays as it is
constexpr uint32_t kWeightsPerLine = EP_LINE_DATA_BYTES / 4;

// A way to divide the work. A unit is `Pieces` pieces of a line for each lane of a warp: small ones
// spread few rows over all warps, large ones take fewer instructions for a row.
template <uint32_t Pieces, uint32_t Warps, uint32_t Entries, uint32_t Partials>
struct Way {
  static constexpr uint32_t kPieces = Pieces;
  static constexpr uint32_t kWarps = Warps;        // of a block: as many as have enough registers
  static constexpr uint32_t kEntries = Entries;    // experts' rows loaded before the first is added
  static constexpr uint32_t kPartials = Partials;  // partials polled before the first is added
  static constexpr uint32_t kLines = Pieces * kLinesPerWarp;
};

// Where partials stand, in lines from a buffer's beginning.
struct PartialLines {
  uint32_t first;
  uint32_t per_owner;
  uint32_t per_slot;
  explicit PartialLines(const ep_combine_args& a)
      : first(lines(a.layout.partials + a.handle.slot * a.layout.partials_slot_stride)),
        per_owner(lines(a.layout.partials_source_stride)),
        per_slot(lines(a.layout.partial_stride)) {}
  static uint32_t lines(uint64_t bytes) { return static_cast<uint32_t>(bytes / kLine); }
};

// What the host works out once for all blocks.
struct Plan {
  Divisor ranks;
  PartialLines partials;
  uint32_t units_per_row;
  // From a warp's unit of received rows to its next: as many units as there are warps.
  uint32_t step_segment;
  uint32_t step_turn;
  uint32_t step_slot;
  Plan(const ep_combine_args& a, uint32_t lines_per_unit, uint32_t warps)
      : ranks(a.group.num_ranks), partials(a),
        units_per_row(div_up(bf16_row(a.group.hidden).lines(), lines_per_unit)),
        step_segment(warps % units_per_row), step_turn(warps / units_per_row % ranks.value),
        step_slot(warps / units_per_row / ranks.value) {}
};

// H is the hidden size where it is known at compile time.
template <uint32_t H, class W>
struct Problem : W {
  // Whether units end where rows do.
  static constexpr bool kWholeUnits = H != 0 && bf16_row(H).lines() % W::kLines == 0;
  const ep_combine_args& a;
  const Plan& plan;

  __device__ __forceinline__ Problem(const ep_combine_args& args, const Plan& p)
      : a(args), plan(p) {}

  __device__ __forceinline__ uint32_t hidden() const { return H != 0 ? H : a.group.hidden; }
  __device__ __forceinline__ RowShape row() const { return bf16_row(hidden()); }
  __device__ __forceinline__ uint32_t row_bytes() const { return 2 * hidden(); }
  __device__ __forceinline__ uint32_t units_per_row() const {
    return H != 0 ? div_up(bf16_row(H).lines(), W::kLines) : plan.units_per_row;
  }
  // The first line of `owner`'s partial of a slot.
  __device__ __forceinline__ uint32_t partial_at(uint32_t owner, uint32_t slot) const {
    return plan.partials.first + owner * plan.partials.per_owner + slot * plan.partials.per_slot;
  }
  // Whose partials a line belongs to. Only for reports, and no division, which would cost registers
  // everywhere.
  __device__ __forceinline__ uint32_t owner_of(uint32_t line) const {
    uint32_t owner = 0;
#pragma unroll 1
    while (line >= partial_at(owner + 1, 0)) ++owner;
    return owner;
  }
  __device__ __forceinline__ uint64_t weights_at(uint64_t base, uint32_t source,
                                                 uint32_t slot) const {
    return base + a.layout.weights + a.handle.slot * a.layout.weights_slot_stride +
           source * a.layout.weights_source_stride + slot * a.layout.weight_stride;
  }
};

// Where a lane's pieces of a unit stand within a row: each `step` bytes after the one before.
struct LanePieces {
  static constexpr uint32_t kBodyStep = kLinesPerWarp * 7 * 16;
  static constexpr uint32_t kTailStep = kLinesPerWarp * 8;
  bool tail;       // pieces of 8 bytes
  uint32_t first;  // bytes
  uint32_t end;    // what stands there or beyond is not of the row
  uint32_t step;
  __device__ __forceinline__ LanePieces(const RowShape& shape, const LaneInLine& lane,
                                        uint32_t line)
      : tail(lane.last()),
        first(tail ? 16 * shape.whole() + 8 * line : 16 * (7 * line + lane.piece)),
        end(16 * (tail ? shape.body : shape.whole())), step(tail ? kTailStep : kBodyStep) {}
  __device__ __forceinline__ bool has(uint32_t i) const { return first + i * step < end; }
};

struct Channels {
  float v[8];
};

__device__ __forceinline__ Channels unpack(uint4 p) {
  const uint32_t w[4] = {p.x, p.y, p.z, p.w};
  Channels c;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c.v[2 * i] = __uint_as_float(w[i] << 16);
    c.v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
  return c;
}

__device__ __forceinline__ uint4 pack(const Channels& c) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 b = __floats2bfloat162_rn(c.v[2 * i], c.v[2 * i + 1]);
    w[i] = *reinterpret_cast<const uint32_t*>(&b);
  }
  return {w[0], w[1], w[2], w[3]};
}

// Pushes a token's weights to the owners of its experts, in the order of their rows' entries. One
// warp.
template <class P>
__device__ __forceinline__ void push_weights(const P& p, uint32_t token, const uint64_t* partners,
                                             uint64_t epoch) {
  const ep_group& g = p.a.group;
  const uint32_t k = threadIdx.x % 32;
  const LaneInLine lane;
  const uint32_t top_k = p.a.handle.top_k;
  uint32_t route = kNowhere;
  float weight = 0.0f;
  if (k < top_k) {
    route = reinterpret_cast<const uint32_t*>(p.a.handle.route)[uint64_t{token} * g.max_top_k + k];
    weight = reinterpret_cast<const float*>(p.a.topk_weights)[uint64_t{token} * top_k + k];
  }
  uint32_t rest = __ballot_sync(~0u, route != kNowhere);
  while (rest != 0) {
    const uint32_t to = __shfl_sync(~0u, route, __ffs(rest) - 1);
    uint32_t members = __ballot_sync(~0u, route == to);
    rest &= ~members;
    float piece[4] = {};
    for (uint32_t i = 0; members != 0; ++i, members &= members - 1) {
      const float w = __shfl_sync(~0u, weight, __ffs(members) - 1);
      const uint32_t at = i % kWeightsPerLine;
      if (lane.line == i / kWeightsPerLine && lane.piece == at / 4) {
#pragma unroll
        for (uint32_t c = 0; c < 4; ++c) piece[c] = at % 4 == c ? w : piece[c];
      }
    }
    const uint64_t partner = partners[to >> 16];
    uint4 v = {__float_as_uint(piece[0]), __float_as_uint(piece[1]), __float_as_uint(piece[2]),
               __float_as_uint(piece[3])};
    if (lane.last()) v = seal({v.x, v.y}, epoch);
    const uint64_t base = p.weights_at(partner, g.rank, to & 0xffff);
    uint8_t* at = reinterpret_cast<uint8_t*>(base) + lane.line * kLine + lane.piece * 16;
    __syncwarp();  // the lanes of a line store together
    arch::st_relaxed_sys_v4_if(partner != 0 && lane.line < p.a.layout.weight_lines, at, v);
  }
}

// A unit of a received row: the source's rows take turns with the other sources'.
struct SendUnit {
  uint32_t slot;
  uint32_t turn;
  uint32_t segment;
  // The `n`th; n is at most the number of warps.
  template <class P>
  __device__ __forceinline__ SendUnit(const P& p, uint32_t n) {
    const uint32_t row = n / p.units_per_row();
    segment = n - row * p.units_per_row();
    slot = p.plan.ranks.quotient(row);
    turn = row - slot * p.plan.ranks.value;
  }
  // To the warp's next.
  template <class P>
  __device__ __forceinline__ void step(const P& p) {
    segment += p.plan.step_segment;
    turn += p.plan.step_turn;
    slot += p.plan.step_slot;
    if (segment >= p.units_per_row()) {
      segment -= p.units_per_row();
      ++turn;
    }
    if (turn >= p.plan.ranks.value) {
      turn -= p.plan.ranks.value;
      ++slot;
    }
  }
  // Each rank begins with another source, so that at any time ranks send to different ones.
  template <class P>
  __device__ __forceinline__ uint32_t source(const P& p) const {
    const uint32_t r = p.a.group.rank + 1 + turn;
    return r < p.plan.ranks.value ? r : r - p.plan.ranks.value;
  }
};

// What dispatch left of a received row.
struct RowEntries {
  uint32_t count = 0;
  uint32_t row = 0;  // of y: the lane's entry
  float weight = 0.0f;
};

// How often a warp, walking the received rows, has looked in vain for weights, which come with
// combine. Others' rows do not wait for those of a rank that is late: these ranks might give this
// one up. So a warp that has looked kManyLooks times, some milliseconds, leaves out what is late
// and walks again, until everything has come or the operation's time is over. What it has sent
// before it then sends again, the same. Kept in shared memory, because registers are few.
constexpr uint32_t kManyLooks = 4096;
constexpr uint32_t kTimeIsOver = ~0u;  // what is late is given up

// The lane's entry's weight, if the weights come with combine. False if they have not come.
template <class P>
__device__ __forceinline__ bool take_weights(const P& p, uint64_t epoch, uint32_t source,
                                             uint32_t slot, uint32_t* looks, float* weight) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x % 32;
  const LaneInLine lane;
  uint4 given = {};
  const uint8_t* from =
      reinterpret_cast<const uint8_t*>(p.weights_at(peer_base(g, g.rank), source, slot)) +
      lane.line * kLine + lane.piece * 16;
  for (;;) {
    if (lane.line < p.a.layout.weight_lines) given = arch::ld_relaxed_sys_v4(from);
    if (__all_sync(~0u,
                   !lane.last() || lane.line >= p.a.layout.weight_lines || sealed(given, epoch)))
      break;
    if (__any_sync(~0u, lane.last() && has_passed(given, epoch))) [[unlikely]] {
      if (thread == 0) report_timeout(g, kCombineSend, epoch, EP_PHASE_WEIGHTS, source);
      return false;
    }
    const uint32_t looked = *looks;
    if (looked == kTimeIsOver && thread == 0)
      report_timeout(g, kCombineSend, epoch, EP_PHASE_WEIGHTS, source);
    if (looked >= kManyLooks) return false;
    __syncwarp();
    if (thread == 0) *looks = looked + 1;
    __syncwarp();
  }
  const uint32_t in_line = thread % kWeightsPerLine;
  const uint32_t holder = thread / kWeightsPerLine * kLanesPerLine + in_line / 4;
  const uint32_t x = __shfl_sync(~0u, given.x, holder);
  const uint32_t y = __shfl_sync(~0u, given.y, holder);
  const uint32_t z = __shfl_sync(~0u, given.z, holder);
  const uint32_t w = __shfl_sync(~0u, given.w, holder);
  const uint32_t low = in_line % 2 == 0 ? x : y;
  const uint32_t high = in_line % 2 == 0 ? z : w;
  *weight = __uint_as_float(in_line % 4 < 2 ? low : high);
  return true;
}

// Packs the sums of a unit of one received row and stores them to the row's source. One warp.
template <class P>
__device__ __forceinline__ void store_unit(const P& p, uint64_t epoch, uint64_t partner,
                                           uint32_t slot, uint32_t first_line,
                                           const Channels (&sum)[P::kPieces]) {
  const LaneInLine lane;
  const uint32_t lines = p.row().lines();
  const uint32_t line = first_line + lane.line;
  // A line's last piece is 8 of the 16 bytes that its lane has summed: the upper ones of odd lines.
  const bool upper = line % 2 != 0;
  uint8_t* to = reinterpret_cast<uint8_t*>(partner) +
                uint64_t{p.partial_at(p.a.group.rank, slot) + line} * kLine + lane.piece * 16;
  uint4 piece[P::kPieces];
#pragma unroll
  for (uint32_t i = 0; i < P::kPieces; ++i) {
    piece[i] = pack(sum[i]);
    const uint2 half = upper ? uint2{piece[i].z, piece[i].w} : uint2{piece[i].x, piece[i].y};
    if (lane.last()) piece[i] = seal(half, epoch);
  }
  __syncwarp();  // the lanes of a line store together
#pragma unroll
  for (uint32_t i = 0; i < P::kPieces; ++i)
    arch::st_relaxed_sys_v4_if(P::kWholeUnits || line + i * kLinesPerWarp < lines,
                               to + i * kLinesPerWarp * kLine, piece[i]);
}

// What a lane loads of a unit of a row of y, as addresses in row 0. All lanes load 16 bytes: for a
// piece of 8 those that contain it, for one that the row does not have the row's last.
template <class P>
struct RowPieces {
  uint64_t at[P::kPieces];
  __device__ __forceinline__ RowPieces(const P& p, uint32_t first_line) {
    const LaneInLine lane;
    const LanePieces pieces(p.row(), lane, first_line + lane.line);
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i) {
      // One number, to which a row is added by one instruction.
      at[i] =
          arch::opaque(p.a.y + min((pieces.first + i * pieces.step) & ~15u, p.row_bytes() - 16));
    }
  }
};

// Adds a unit of the rows of entries [e, e + N), all of which are loaded before the first is added.
// To nothing, if they are the first.
template <uint32_t N, bool First, class P>
__device__ __forceinline__ void add_rows(const P& p, const RowPieces<P>& pieces,
                                         const RowEntries& entries, uint32_t e,
                                         Channels (&sum)[P::kPieces]) {
  uint4 rows[N][P::kPieces];
#pragma unroll
  for (uint32_t j = 0; j < N; ++j) {
    const uint64_t row = uint64_t{__shfl_sync(~0u, entries.row, e + j)} * p.row_bytes();
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i)
      rows[j][i] = arch::ld_stream_v4(reinterpret_cast<const void*>(pieces.at[i] + row));
  }
#pragma unroll
  for (uint32_t j = 0; j < N; ++j) {
    const float weight = __shfl_sync(~0u, entries.weight, e + j);
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i) {
      const Channels c = unpack(rows[j][i]);
#pragma unroll
      for (int v = 0; v < 8; ++v)
        sum[i].v[v] = First && j == 0 ? weight * c.v[v] : fmaf(weight, c.v[v], sum[i].v[v]);
    }
  }
}

// As add_rows, of `n` entries: between one and `Most`.
template <uint32_t Most, bool First, class P>
__device__ __forceinline__ void add_some_rows(const P& p, const RowPieces<P>& pieces,
                                              const RowEntries& entries, uint32_t e, uint32_t n,
                                              Channels (&sum)[P::kPieces]) {
  if constexpr (Most > 1) {
    if (n < Most) return add_some_rows<Most - 1, First>(p, pieces, entries, e, n, sum);
  }
  add_rows<Most, First>(p, pieces, entries, e, sum);
}

// Reduces a unit of one received row, which has at least one entry. One warp.
template <class P>
__device__ __forceinline__ void send_unit(const P& p, uint64_t epoch, uint64_t partner,
                                          uint32_t slot, uint32_t first_line,
                                          const RowEntries& entries) {
  const RowPieces<P> pieces(p, first_line);
  Channels sum[P::kPieces];
  add_some_rows<P::kEntries, true>(p, pieces, entries, 0, entries.count, sum);
#pragma unroll 1
  for (uint32_t e = P::kEntries; e < entries.count; e += P::kEntries)
    add_some_rows<P::kEntries, false>(p, pieces, entries, e, entries.count - e, sum);
  store_unit(p, epoch, partner, slot, first_line, sum);
}

template <class P>
__device__ __forceinline__ RowEntries load_entries(const P& p, uint32_t source, uint32_t slot) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x % 32;
  const uint64_t* map = reinterpret_cast<const uint64_t*>(p.a.handle.recv_map) +
                        (source * g.max_tokens + slot) * (1 + g.max_top_k);
  RowEntries entries;
  entries.count = static_cast<uint32_t>(map[0] >> 32);
  if (thread < g.max_top_k) {
    const uint64_t mine = map[1 + thread];
    entries.row = static_cast<uint32_t>(mine);
    entries.weight = __uint_as_float(static_cast<uint32_t>(mine >> 32));
  }
  return entries;
}

// The rows of the source that has most.
template <class P>
__device__ __forceinline__ uint32_t most_rows(const P& p, const uint32_t* source_rows) {
  uint32_t most = 0;
  for (uint32_t r = threadIdx.x % 32; r < p.a.group.num_ranks; r += 32)
    most = max(most, source_rows[r]);
  return __reduce_max_sync(~0u, most);
}

// Where a source's rows go, or 0 if they cannot.
template <class P>
__device__ __forceinline__ uint64_t destination(const P& p, const uint64_t* partners,
                                                uint64_t epoch, uint32_t source) {
  const ep_group& g = p.a.group;
  const uint64_t partner = partners[source];
  if (partner == 0 && threadIdx.x % 32 == 0 && peer_base(g, source) == 0) [[unlikely]]
    record_peer_fault(g, kCombineSend, epoch, EP_FAULT_UNREACHABLE, EP_PHASE_SEND, source, 0, 0);
  return partner;
}

// Walks the rows that were received. One warp.
template <class P>
__device__ __forceinline__ void send(const P& p, const uint64_t* partners,
                                     const uint32_t* source_rows, uint64_t epoch, uint32_t* looks) {
  const uint32_t most = most_rows(p, source_rows);
  auto load = [&](const SendUnit& unit) {
    if (unit.slot >= most) return RowEntries();
    const uint32_t source = unit.source(p);
    if (unit.slot >= source_rows[source]) return RowEntries();
    return load_entries(p, source, unit.slot);
  };
  // What a row consists of is loaded while the row before is on its way.
  SendUnit unit(p, threadIdx.x / 32 * gridDim.x + blockIdx.x);
  RowEntries next = load(unit);
#pragma unroll 1
  while (unit.slot < most) {
    RowEntries entries = next;
    entries.count = __reduce_max_sync(~0u, entries.count);  // the same, as the compiler then knows
    const uint32_t source = unit.source(p);
    const uint32_t slot = unit.slot;
    const uint32_t first_line = unit.segment * P::kLines;
    unit.step(p);
    next = load(unit);
    if (entries.count == 0) continue;
    const uint64_t partner = destination(p, partners, epoch, source);
    if (partner == 0) [[unlikely]]
      continue;
    if ((p.a.flags & EP_COMBINE_WEIGHTS) != 0 &&
        !take_weights(p, epoch, source, slot, looks, &entries.weight))
      continue;
    send_unit(p, epoch, partner, slot, first_line, entries);
  }
}

// Adds a unit of the partials whose lines of this lane begin at `at`, `N` of them, all of which are
// loaded before the first is added. To nothing, if they are the first. What does not come in time
// is left out. Returns which: bit n for the nth.
template <uint32_t N, bool First, class P>
__device__ __forceinline__ uint32_t add_partials(const P& p, uint64_t epoch,
                                                 const uint32_t (&at)[P::kPartials], uint32_t line,
                                                 Channels (&sum)[P::kPieces]) {
  const ep_group& g = p.a.group;
  const LaneInLine lane;
  const uint8_t* base = reinterpret_cast<const uint8_t*>(peer_base(g, g.rank)) + lane.piece * 16;
  uint4 piece[N][P::kPieces];
  auto has = [&](uint32_t i) {
    return P::kWholeUnits || line + i * kLinesPerWarp < p.row().lines();
  };
  auto load = [&](uint32_t n) {
    const uint8_t* from = base + uint64_t{at[n]} * kLine;
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i)
      piece[n][i] = has(i) ? arch::ld_relaxed_sys_v4(from + i * kLinesPerWarp * kLine) : uint4{};
  };
  auto is_here = [&](uint32_t n) {
    bool here = true;
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i) here &= !has(i) || sealed(piece[n][i], epoch);
    return __all_sync(~0u, here || !lane.last());
  };
  auto will_not_come = [&](uint32_t n) {
    bool passed = false;
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i) passed |= has_passed(piece[n][i], epoch);
    return __any_sync(~0u, passed && lane.last());
  };
  uint32_t missing = 0;
#pragma unroll
  for (uint32_t n = 0; n < N; ++n) load(n);
#pragma unroll
  for (uint32_t n = 0; n < N; ++n) missing |= is_here(n) ? 0 : 1u << n;
  uint32_t late = missing;
  Patience patience;
#pragma unroll 1
  while (late != 0) {
#pragma unroll
    for (uint32_t n = 0; n < N; ++n)
      if ((late >> n & 1) != 0) load(n);
#pragma unroll
    for (uint32_t n = 0; n < N; ++n) {
      if ((late >> n & 1) == 0) continue;
      const bool here = is_here(n);
      if (here) missing &= ~(1u << n);
      if (here || will_not_come(n)) late &= ~(1u << n);
    }
    if (late != 0 && __any_sync(~0u, patience.expired(g, kCombineRecv, epoch))) [[unlikely]]
      break;
  }
  if (missing != 0) [[unlikely]] {
#pragma unroll
    for (uint32_t n = 0; n < N; ++n)
#pragma unroll
      for (uint32_t i = 0; i < P::kPieces; ++i)
        if ((missing >> n & 1) != 0) piece[n][i] = {kNothing, kNothing, kNothing, kNothing};
  }
#pragma unroll
  for (uint32_t n = 0; n < N; ++n) {
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i) {
      const Channels c = unpack(piece[n][i]);
#pragma unroll
      for (int v = 0; v < 8; ++v) sum[i].v[v] = First && n == 0 ? c.v[v] : sum[i].v[v] + c.v[v];
    }
  }
  return missing;
}

// As add_partials, of `n`: between one and `Most`.
template <uint32_t Most, bool First, class P>
__device__ __forceinline__ uint32_t add_some_partials(const P& p, uint64_t epoch,
                                                      const uint32_t (&at)[P::kPartials],
                                                      uint32_t line, uint32_t n,
                                                      Channels (&sum)[P::kPieces]) {
  if constexpr (Most > 1) {
    if (n < Most) return add_some_partials<Most - 1, First>(p, epoch, at, line, n, sum);
  }
  return add_partials<Most, First>(p, epoch, at, line, sum);
}

// Sums a unit of one token's partials. `route` is the lane's entry's. One warp.
template <class P>
__device__ __forceinline__ void receive_unit(const P& p, const uint64_t* partners, uint64_t epoch,
                                             uint32_t token, uint32_t first_line, uint32_t route) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x % 32;
  const LaneInLine lane;
  const uint32_t line = first_line + lane.line;
  // What a rank that takes no part had promised does not come.
  if (route != kNowhere && partners[route >> 16] == 0) [[unlikely]] {
    if (peer_base(g, route >> 16) == 0)
      record_peer_fault(g, kCombineRecv, epoch, EP_FAULT_UNREACHABLE, EP_PHASE_PARTIALS,
                        route >> 16, token, 0);
    route = kNowhere;
  }

  Channels sum[P::kPieces];
  bool any = false;
  uint32_t next = __reduce_min_sync(~0u, route);
  // Owners ascend, some at a time.
  auto add = [&](auto first) {
    uint32_t at[P::kPartials];
    uint32_t n = 0;
#pragma unroll
    for (uint32_t m = 0; m < P::kPartials; ++m) {
      at[m] = p.partial_at(next >> 16, next & 0xffff) + line;
      if (next == kNowhere) continue;
      ++n;
      if (route == next) route = kNowhere;
      next = __reduce_min_sync(~0u, route);
    }
    const uint32_t missing =
        add_some_partials<P::kPartials, decltype(first)::value>(p, epoch, at, line, n, sum);
    any |= missing != (1u << n) - 1;
    if (missing == 0) return;
    uint32_t mine_at = at[0];
#pragma unroll
    for (uint32_t m = 1; m < P::kPartials; ++m)
      if (thread == m) mine_at = at[m];
    if ((missing >> thread & 1) != 0)
      report_timeout(g, kCombineRecv, epoch, EP_PHASE_PARTIALS, p.owner_of(mine_at));
  };
  if (next != kNowhere) add(std::true_type());
#pragma unroll 1
  while (next != kNowhere) add(std::false_type());
  if (!any) {
#pragma unroll
    for (uint32_t i = 0; i < P::kPieces; ++i) sum[i] = {};
  }

  const LanePieces pieces(p.row(), lane, line);
  uint8_t* out =
      reinterpret_cast<uint8_t*>(p.a.out) + uint64_t{token} * p.row_bytes() + pieces.first;
#pragma unroll
  for (uint32_t i = 0; i < P::kPieces; ++i) {
    const uint4 v = pack(sum[i]);
    const bool has = pieces.has(i);
    arch::st_v4_if(has && !pieces.tail, out + i * LanePieces::kBodyStep, v);
    arch::st_v2_if(has && pieces.tail, out + i * LanePieces::kTailStep, {v.x, v.y});
  }
}

template <class P>
__device__ __forceinline__ void receive(const P& p, const uint64_t* partners, uint64_t epoch) {
  const uint32_t units = p.a.handle.num_tokens * p.units_per_row();
  const uint32_t thread = threadIdx.x % 32;
  const uint32_t step = P::kWarps * gridDim.x;
  auto load_route = [&](uint32_t u) {
    const uint32_t* route = reinterpret_cast<const uint32_t*>(p.a.handle.route);
    return u < units && thread < p.a.handle.top_k
               ? route[uint64_t{u / p.units_per_row()} * p.a.group.max_top_k + thread]
               : kNowhere;
  };
  // Where a token's partials come from is loaded while those before are on their way.
  uint32_t u = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  uint32_t next = load_route(u);
#pragma unroll 1
  for (; u < units; u += step) {
    const uint32_t route = next;
    next = load_route(u + step);
    const uint32_t token = u / p.units_per_row();
    receive_unit(p, partners, epoch, token, (u - token * p.units_per_row()) * P::kLines, route);
  }
}

// The rows that dispatch left of a source.
__device__ __forceinline__ uint32_t rows_from(const ep_handle& handle, uint32_t source) {
  const uint32_t rows = reinterpret_cast<const uint32_t*>(handle.recv_rows)[source];
  return (rows & EP_ROWS_GIVEN_UP) != 0 ? 0 : rows;
}

template <uint32_t H, class W>
__global__ void __launch_bounds__(32 * W::kWarps, 1)
    combine(const __grid_constant__ ep_combine_args args, const __grid_constant__ Plan plan) {
  EP_DYNAMIC_SHARED(uint64_t, partners);  // [R], then source_rows u32 [R]
  EP_SHARED(uint64_t, send_epoch);
  EP_SHARED(uint64_t, recv_epoch);
  constexpr uint32_t kWarps = W::kWarps;
  EP_SHARED(uint32_t[kWarps], looks);
  const Problem<H, W> p(args, plan);
  const ep_group& g = args.group;
  const Control control(g);
  uint32_t* source_rows = reinterpret_cast<uint32_t*>(partners + g.num_ranks);
  const bool sends = (args.flags & EP_COMBINE_SEND) != 0;
  const bool receives = (args.flags & EP_COMBINE_RECV) != 0;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  if (threadIdx.x == 0) send_epoch = epoch_of(control, kCombineSend);
  if (threadIdx.x == 1) recv_epoch = epoch_of(control, kCombineRecv);
  if (lane == 0) looks[warp] = 0;
  if (warp == 1)
    for (uint32_t r = lane; r < g.num_ranks; r += 32) partners[r] = partner_base(g, control, r);
  if (warp == 2)
    for (uint32_t r = lane; r < g.num_ranks; r += 32) source_rows[r] = rows_from(args.handle, r);
  __syncthreads();
  // The warp that has the least to do.
  if (warp == kWarps - 1) {
    if (lane == 0 && sends) advance(control, kCombineSend, send_epoch);
    if (lane == 1 && receives) advance(control, kCombineRecv, recv_epoch);
    __syncwarp();
  }

  if (sends && (args.flags & EP_COMBINE_WEIGHTS) != 0) {
    for (uint32_t t = warp * gridDim.x + blockIdx.x; t < args.handle.num_tokens;
         t += kWarps * gridDim.x)
      push_weights(p, t, partners, send_epoch);
  }
  bool walks = sends;
#pragma unroll 1
  while (walks) {
    uint32_t* looked = looks + threadIdx.x / 32;
    send(p, partners, source_rows, send_epoch, looked);
    walks = *looked == kManyLooks;
    __syncwarp();
    if (walks && lane == 0)
      *looked = waited_ns(g, kCombineSend, send_epoch) >= g.timeout_ns ? kTimeIsOver : 0;
    __syncwarp();
  }
  if (receives) receive(p, partners, recv_epoch);
}

struct CombineKernel {
  void (*kernel)(const ep_combine_args, const Plan);
  uint32_t threads;
  uint32_t lines;  // of a unit
};

template <uint32_t H, class W>
constexpr CombineKernel kernel() {
  return {combine<H, W>, 32 * W::kWarps, W::kLines};
}

// For few and for many rows a warp.
template <uint32_t H>
constexpr CombineKernel kFewRows = kernel<H, Way<1, H != 0 ? 32 : 28, 3, 3>>();
template <uint32_t H>
constexpr CombineKernel kManyRows = kernel<H, Way<5, 16, 2, 2>>();

template <uint32_t H>
const CombineKernel& kernel_for(bool many_rows) {
  return many_rows ? kManyRows<H> : kFewRows<H>;
}

// All ways give the same bits.
const CombineKernel& kernel_for(const ep_combine_args& a, unsigned grid) {
  // Small units that a warp would have, if all ranks had this rank's number of tokens. With more,
  // large ones are faster (docs/performance.md).
  constexpr uint64_t kMostUnits = 5;
  const uint64_t rows = uint64_t{a.handle.num_tokens} * most_destinations(a.group, a.handle.top_k);
  const uint64_t units = rows * div_up(bf16_row(a.group.hidden).lines(), kLinesPerWarp);
  const bool many_rows = units > kMostUnits * 32 * grid;
  switch (a.group.hidden) {
  case 3584: return kernel_for<3584>(many_rows);
  case 7168: return kernel_for<7168>(many_rows);
  default: return kernel_for<0>(many_rows);
  }
}

bool is_sound(const ep_combine_args& a) {
  constexpr uint32_t kParts = EP_COMBINE_SEND | EP_COMBINE_RECV;
  if (a.struct_size != sizeof(a) || (a.flags & kParts) == 0 ||
      (a.flags & ~(kParts | EP_COMBINE_WEIGHTS)) != 0 || !group_is_sound(a.group) ||
      !handle_is_sound(a.handle, a.group, a.layout) || !aligned_for_vectors(a.y, a.out))
    return false;
  const bool tokens = a.handle.num_tokens != 0;
  if ((a.flags & EP_COMBINE_WEIGHTS) != 0 && tokens && a.topk_weights == 0) return false;
  return ((a.flags & EP_COMBINE_SEND) == 0 || a.y != 0) &&
         ((a.flags & EP_COMBINE_RECV) == 0 || !tokens || a.out != 0);
}

}  // namespace
}  // namespace ep

cudaError_t ep::load_combine() {
  return load(kFewRows<3584>.kernel, kManyRows<3584>.kernel, kFewRows<7168>.kernel,
              kManyRows<7168>.kernel, kFewRows<0>.kernel, kManyRows<0>.kernel);
}

extern "C" int32_t ep_combine_launch(const ep_combine_args* args, void* stream,
                                     int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || !is_sound(*args)) return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->group.device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  unsigned grid = 0;
  cudaError_t e = grid_for(args->group, &grid);
  if (e == cudaSuccess) {
    const CombineKernel& k = kernel_for(*args, grid);
    const Plan plan(*args, k.lines, k.threads / 32 * grid);
    e = launch(k.kernel, grid, k.threads, 12 * args->group.num_ranks, stream, *args, plan);
  }
  return status_of(e, cuda_error);
}
