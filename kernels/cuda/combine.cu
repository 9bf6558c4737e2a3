// Combine: the owner of a token's experts reduces its rows to one partial and pushes it back; the
// token's rank sums the partials.
//
// Every warp first sends, walking the rows that were received, then receives, walking the tokens
// that were sent: what others wait for comes first, and nobody polls while there is something to
// send. If the weights are given only here, they are pushed to the owners before anything else. No
// block waits for another block.

#include <cuda_bf16.h>

#include "group.cuh"
#include "launch.cuh"
#include "line.cuh"

namespace ep {
namespace {

constexpr uint32_t kNowhere = ~0u;
constexpr uint32_t kEntriesAtOnce = 4;   // experts' rows loaded before the first is added
constexpr uint32_t kPartialsAtOnce = 4;  // partials polled before the first is added
constexpr uint32_t kWeightsPerLine = EP_LINE_DATA_BYTES / 4;

// H is the hidden size where it is known at compile time.
template <uint32_t H>
struct Problem {
  // Warps of a block: as many as can have the registers that they need.
  static constexpr uint32_t kWarps = H != 0 ? 32 : 28;
  const ep_combine_args& a;

  __device__ __forceinline__ explicit Problem(const ep_combine_args& args) : a(args) {}

  __device__ __forceinline__ uint32_t hidden() const { return H != 0 ? H : a.group.hidden; }
  __device__ __forceinline__ RowShape row() const { return bf16_row(hidden()); }
  // Where `owner`'s partials for this rank, or this rank's for others, stand in the buffer at
  // `base`.
  __device__ __forceinline__ uint64_t partial_at(uint64_t base, uint32_t owner,
                                                 uint32_t slot) const {
    return base + a.layout.partials + a.handle.slot * a.layout.partials_slot_stride +
           owner * a.layout.partials_source_stride + slot * a.layout.partial_stride;
  }
  // Whose partials a line of the buffer belongs to. Only for reports, and no division, which would
  // cost registers everywhere.
  __device__ __forceinline__ uint32_t owner_of(uint32_t line) const {
    const uint64_t offset = uint64_t{line} * kLine;
    uint32_t owner = 0;
#pragma unroll 1
    while (offset >= partial_at(0, owner + 1, 0)) ++owner;
    return owner;
  }
  __device__ __forceinline__ uint64_t weights_at(uint64_t base, uint32_t source,
                                                 uint32_t slot) const {
    return base + a.layout.weights + a.handle.slot * a.layout.weights_slot_stride +
           source * a.layout.weights_source_stride + slot * a.layout.weight_stride;
  }
};

// Byte offset, within a row, of the piece of a line that a lane carries; `row bytes` if it carries
// none.
__device__ __forceinline__ uint32_t piece_offset(const RowShape& shape, uint32_t line,
                                                 const LaneInLine& lane) {
  if (line >= shape.lines()) return 16 * shape.body;
  if (!lane.last()) {
    const uint32_t unit = 7 * line + lane.piece;
    return unit < shape.whole() ? 16 * unit : 16 * shape.body;
  }
  return min(16 * shape.whole() + 8 * line, 16 * shape.body);
}

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
        for (uint32_t c = 0; c < 4; ++c)
          if (at % 4 == c) piece[c] = w;
      }
    }
    const uint64_t partner = partners[to >> 16];
    if (partner != 0 && lane.line < p.a.layout.weight_lines) {
      uint4 v = {__float_as_uint(piece[0]), __float_as_uint(piece[1]), __float_as_uint(piece[2]),
                 __float_as_uint(piece[3])};
      if (lane.last()) v = seal({v.x, v.y}, epoch);
      const uint64_t base = p.weights_at(partner, g.rank, to & 0xffff);
      arch::st_relaxed_sys_v4(
          reinterpret_cast<uint8_t*>(base) + lane.line * kLine + lane.piece * 16, v);
    }
  }
}

// Some lines of a received row.
struct SendUnit {
  uint32_t source;
  uint32_t slot;
  uint32_t first_line;
};

// What dispatch left of a received row.
struct RowEntries {
  uint32_t count = 0;
  uint64_t mine = 0;  // the lane's: row of y and weight
};

// Reduces some lines of one received row and stores them to the row's source. One warp.
template <class P>
__device__ __forceinline__ void send_unit(const P& p, uint64_t epoch, uint64_t partner,
                                          const SendUnit& unit, const RowEntries& entries) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x % 32;
  const LaneInLine lane;
  const RowShape shape = p.row();
  if (entries.count == 0) return;

  uint4 given = {};
  const bool weights_here = (p.a.flags & EP_COMBINE_WEIGHTS) != 0;
  if (weights_here) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(
                              p.weights_at(peer_base(g, g.rank), unit.source, unit.slot)) +
                          lane.line * kLine + lane.piece * 16;
    Patience patience;
    for (;;) {
      if (lane.line < p.a.layout.weight_lines) given = arch::ld_relaxed_sys_v4(from);
      if (__all_sync(~0u,
                     !lane.last() || lane.line >= p.a.layout.weight_lines || sealed(given, epoch)))
        break;
      if (__any_sync(~0u, patience.expired(g, kCombineSend, epoch))) [[unlikely]] {
        if (thread == 0) report_timeout(g, kCombineSend, epoch, EP_PHASE_WEIGHTS, unit.source);
        return;
      }
    }
  }

  const uint8_t* y = reinterpret_cast<const uint8_t*>(p.a.y);
  const uint32_t row_bytes = 16 * shape.body;
  const uint32_t line = unit.first_line + lane.line;
  const uint32_t offset = piece_offset(shape, line, lane);

  Channels sum;
#pragma unroll 1
  for (uint32_t e = 0; e < entries.count; e += kEntriesAtOnce) {
    uint4 rows[kEntriesAtOnce];
    float weight[kEntriesAtOnce];
#pragma unroll
    for (uint32_t j = 0; j < kEntriesAtOnce; ++j) {
      const uint32_t at = e + j;
      const uint64_t which = __shfl_sync(~0u, entries.mine, at % 32);
      const uint8_t* row = y + uint64_t{static_cast<uint32_t>(which)} * row_bytes;
      weight[j] = __uint_as_float(static_cast<uint32_t>(which >> 32));
      if (weights_here) {
        const uint32_t in_line = at % kWeightsPerLine;
        const uint32_t c = in_line % 4;
        const uint32_t mine = c == 0 ? given.x : c == 1 ? given.y : c == 2 ? given.z : given.w;
        weight[j] = __uint_as_float(
            __shfl_sync(~0u, mine, at / kWeightsPerLine * kLanesPerLine + in_line / 4));
      }
      rows[j] = {};
      if (at < entries.count && offset < row_bytes) {
        if (!lane.last()) {
          rows[j] = arch::ld_stream_v4(row + offset);
        } else {
          const uint2 half = arch::ld_stream_v2(row + offset);
          rows[j] = {half.x, half.y, 0, 0};
        }
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < kEntriesAtOnce; ++j) {
      if (e + j >= entries.count) break;
      const Channels c = unpack(rows[j]);
#pragma unroll
      for (int v = 0; v < 8; ++v)
        sum.v[v] = e + j == 0 ? weight[j] * c.v[v] : fmaf(weight[j], c.v[v], sum.v[v]);
    }
  }

  uint8_t* to =
      reinterpret_cast<uint8_t*>(p.partial_at(partner, g.rank, unit.slot)) + lane.piece * 16;
  uint4 v = pack(sum);
  if (lane.last()) v = seal({v.x, v.y}, epoch);
  if (line < shape.lines()) arch::st_relaxed_sys_v4(to + line * kLine, v);
}

template <class P>
__device__ __forceinline__ void send(const P& p, const uint64_t* partners,
                                     const uint32_t* source_rows, uint64_t epoch) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x % 32;
  uint32_t most = 0;
#pragma unroll 1
  for (uint32_t r = 0; r < g.num_ranks; ++r) most = max(most, source_rows[r]);
  const uint32_t units_per_row = div_up(p.row().lines(), kLinesPerWarp);
  const uint32_t units = most * g.num_ranks * units_per_row;
  auto find = [&](uint32_t u) {
    const uint32_t row = u / units_per_row;
    SendUnit unit;
    unit.slot = row / g.num_ranks;
    // Each rank begins with another source, so that at any time ranks send to different ones.
    const uint32_t turn = row - unit.slot * g.num_ranks + g.rank + 1;
    unit.source = turn < g.num_ranks ? turn : turn - g.num_ranks;
    unit.first_line = (u - row * units_per_row) * kLinesPerWarp;
    return unit;
  };
  auto load = [&](uint32_t u) {
    RowEntries entries;
    if (u >= units) return entries;
    const SendUnit unit = find(u);
    if (unit.slot >= source_rows[unit.source]) return entries;
    const uint64_t* map = reinterpret_cast<const uint64_t*>(p.a.handle.recv_map) +
                          (uint64_t{unit.source} * g.max_tokens + unit.slot) * (1 + g.max_top_k);
    entries.count = static_cast<uint32_t>(map[0] >> 32);
    if (thread < g.max_top_k) entries.mine = map[1 + thread];
    return entries;
  };
  // What a row consists of is loaded while the row before is on its way.
  uint32_t u = threadIdx.x / 32 * gridDim.x + blockIdx.x;
  RowEntries next = load(u);
#pragma unroll 1
  for (; u < units; u += P::kWarps * gridDim.x) {
    const RowEntries entries = next;
    next = load(u + P::kWarps * gridDim.x);
    const SendUnit unit = find(u);
    if (unit.slot >= source_rows[unit.source]) continue;
    const uint64_t partner = partners[unit.source];
    if (partner != 0)
      send_unit(p, epoch, partner, unit, entries);
    else if (thread == 0 && peer_base(g, unit.source) == 0)
      record_peer_fault(g, kCombineSend, epoch, EP_FAULT_UNREACHABLE, EP_PHASE_SEND, unit.source, 0,
                        0);
  }
}

// Sums some lines of one token's partials. One warp.
template <class P>
__device__ __forceinline__ void receive_unit(const P& p, const uint64_t* partners, uint64_t epoch,
                                             uint32_t token, uint32_t first_line) {
  const ep_group& g = p.a.group;
  const uint32_t thread = threadIdx.x % 32;
  const LaneInLine lane;
  const RowShape shape = p.row();
  const uint32_t line = first_line + lane.line;
  const bool mine = line < shape.lines();
  uint32_t route = kNowhere;
  if (thread < p.a.handle.top_k)
    route =
        reinterpret_cast<const uint32_t*>(p.a.handle.route)[uint64_t{token} * g.max_top_k + thread];

  const uint8_t* base = reinterpret_cast<const uint8_t*>(peer_base(g, g.rank));
  // What a rank that takes no part had promised does not come.
  if (route != kNowhere && partners[route >> 16] == 0) [[unlikely]] {
    if (peer_base(g, route >> 16) == 0)
      record_peer_fault(g, kCombineRecv, epoch, EP_FAULT_UNREACHABLE, EP_PHASE_PARTIALS,
                        route >> 16, token, 0);
    route = kNowhere;
  }

  Channels sum = {};
  bool any = false;
  uint32_t next = __reduce_min_sync(~0u, route);
#pragma unroll 1
  while (next != kNowhere) {
    // Owners ascend, some at a time.
    uint32_t at[kPartialsAtOnce];  // the lane's line, counted from the buffer's base
    uint4 piece[kPartialsAtOnce];
    uint32_t wanted = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPartialsAtOnce; ++i) {
      at[i] = static_cast<uint32_t>(p.partial_at(0, next >> 16, next & 0xffff) / kLine) + line;
      piece[i] = {};
      if (next != kNowhere) {
        wanted |= 1u << i;
        if (route == next) route = kNowhere;
        next = __reduce_min_sync(~0u, route);
      }
    }
    Patience patience;
    uint32_t missing = wanted;
    while (missing != 0) {
#pragma unroll
      for (uint32_t i = 0; i < kPartialsAtOnce; ++i)
        if ((missing >> i & 1) != 0 && mine)
          piece[i] = arch::ld_relaxed_sys_v4(base + uint64_t{at[i]} * kLine + lane.piece * 16);
#pragma unroll
      for (uint32_t i = 0; i < kPartialsAtOnce; ++i)
        if ((missing >> i & 1) != 0 &&
            __all_sync(~0u, !mine || !lane.last() || sealed(piece[i], epoch)))
          missing &= ~(1u << i);
      if (missing != 0 && __any_sync(~0u, patience.expired(g, kCombineRecv, epoch))) [[unlikely]] {
        uint32_t mine_at = at[0];
#pragma unroll
        for (uint32_t i = 1; i < kPartialsAtOnce; ++i)
          if (thread == i) mine_at = at[i];
        if (thread < kPartialsAtOnce && (missing >> thread & 1) != 0)
          report_timeout(g, kCombineRecv, epoch, EP_PHASE_PARTIALS, p.owner_of(mine_at));
        break;
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kPartialsAtOnce; ++i) {
      if (((wanted & ~missing) >> i & 1) == 0) continue;
      const Channels c = unpack(piece[i]);
#pragma unroll
      for (int v = 0; v < 8; ++v) sum.v[v] = any ? sum.v[v] + c.v[v] : c.v[v];
      any = true;
    }
  }

  const uint32_t row_bytes = 16 * shape.body;
  const uint32_t offset = piece_offset(shape, line, lane);
  if (offset >= row_bytes) return;
  uint8_t* out = reinterpret_cast<uint8_t*>(p.a.out) + uint64_t{token} * row_bytes + offset;
  const uint4 v = pack(sum);
  if (!lane.last())
    *reinterpret_cast<uint4*>(out) = v;
  else
    *reinterpret_cast<uint2*>(out) = {v.x, v.y};
}

template <class P>
__device__ __forceinline__ void receive(const P& p, const uint64_t* partners, uint64_t epoch) {
  const uint32_t units_per_row = div_up(p.row().lines(), kLinesPerWarp);
  const uint32_t units = p.a.handle.num_tokens * units_per_row;
  const uint32_t warp = threadIdx.x / 32;
#pragma unroll 1
  for (uint32_t u = warp * gridDim.x + blockIdx.x; u < units; u += P::kWarps * gridDim.x)
    receive_unit(p, partners, epoch, u / units_per_row, u % units_per_row * kLinesPerWarp);
}

template <uint32_t H>
__global__ void __launch_bounds__(32 * Problem<H>::kWarps, 1)
    combine(const __grid_constant__ ep_combine_args args) {
  extern __shared__ uint64_t partners[];  // [R], then source_rows u32 [R]
  __shared__ uint64_t send_epoch;
  __shared__ uint64_t recv_epoch;
  constexpr uint32_t kWarps = Problem<H>::kWarps;
  const Problem<H> p(args);
  const ep_group& g = args.group;
  const Control control(g);
  uint32_t* source_rows = reinterpret_cast<uint32_t*>(partners + g.num_ranks);
  const bool sends = (args.flags & EP_COMBINE_SEND) != 0;
  const bool receives = (args.flags & EP_COMBINE_RECV) != 0;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  if (threadIdx.x == 0) send_epoch = epoch_of(control, kCombineSend);
  if (threadIdx.x == 1) recv_epoch = epoch_of(control, kCombineRecv);
  if (warp == 1)
    for (uint32_t r = lane; r < g.num_ranks; r += 32) partners[r] = partner_base(g, control, r);
  if (warp == 2)
    for (uint32_t r = lane; r < g.num_ranks; r += 32)
      source_rows[r] = reinterpret_cast<const uint32_t*>(args.handle.recv_rows)[r];
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
  if (sends) send(p, partners, source_rows, send_epoch);
  if (receives) receive(p, partners, recv_epoch);
}

struct CombineKernel {
  void (*kernel)(const ep_combine_args);
  uint32_t threads;
};

template <uint32_t H>
constexpr CombineKernel kernel() {
  return {combine<H>, 32 * Problem<H>::kWarps};
}

CombineKernel kernel_for(uint32_t hidden) {
  switch (hidden) {
  case 3584: return kernel<3584>();
  case 7168: return kernel<7168>();
  default: return kernel<0>();
  }
}

bool is_sound(const ep_combine_args& a) {
  constexpr uint32_t kParts = EP_COMBINE_SEND | EP_COMBINE_RECV;
  if (a.struct_size != sizeof(a) || (a.flags & kParts) == 0 ||
      (a.flags & ~(kParts | EP_COMBINE_WEIGHTS)) != 0 || !group_is_sound(a.group) ||
      !handle_is_sound(a.handle, a.group, a.layout))
    return false;
  const bool tokens = a.handle.num_tokens != 0;
  if ((a.flags & EP_COMBINE_WEIGHTS) != 0 && tokens && a.topk_weights == 0) return false;
  return ((a.flags & EP_COMBINE_SEND) == 0 || a.y != 0) &&
         ((a.flags & EP_COMBINE_RECV) == 0 || !tokens || a.out != 0);
}

}  // namespace
}  // namespace ep

cudaError_t ep::load_combine() { return load(combine<3584>, combine<7168>, combine<0>); }

extern "C" int32_t ep_combine_launch(const ep_combine_args* args, void* stream,
                                     int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || !is_sound(*args)) return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->group.device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  unsigned grid = 0;
  cudaError_t e = grid_for(args->group, &grid);
  if (e == cudaSuccess) {
    const CombineKernel k = kernel_for(args->group.hidden);
    k.kernel<<<grid, k.threads, 12 * args->group.num_ranks, static_cast<cudaStream_t>(stream)>>>(
        *args);
    e = cudaGetLastError();
  }
  return status_of(e, cuda_error);
}
