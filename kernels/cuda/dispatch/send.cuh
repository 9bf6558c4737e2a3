// The senders' task: to quantise tokens, and to store their lines to the peers.
#pragma once

#include <cuda_bf16.h>

#include "arch/fp8.cuh"
#include "arch/predicated.cuh"
#include "dispatch/plan.cuh"

namespace ep {
namespace {

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

}  // namespace
}  // namespace ep
