// What every warp does in the end: rows' lines to their experts, as they arrive.
#pragma once

#include "arch/predicated.cuh"
#include "dispatch/read.cuh"

namespace ep {
namespace {

constexpr uint32_t kCopies = 4;  // of a row, whose addresses are looked up at once

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

}  // namespace
}  // namespace ep
