// The unit of the wire: a 128-byte line of 120 bytes of data and the epoch they belong to.
//
// One store instruction of eight neighbouring lanes writes a whole line, and NVLink makes such a
// line visible as a whole, so a reader that finds the epoch has the data too: no fence, no flag of
// its own. Lanes that have diverged would store by several, so a warp converges before a row.
// A lane's 16-byte piece is data, but for the last, which is 8 bytes of data and the epoch.
//
// A row of 16-byte units (the body) and 8-byte units (the scales) fills n lines: piece p < 7 of
// line i carries body unit 7 i + p, so that bodies are copied 16 aligned bytes at a time; the
// 8-byte pieces carry, in order, the scales and then the body units beyond 7 n, in halves.
#pragma once

#include "arch/memory.cuh"
#include "ep_kernels.h"

namespace ep {

constexpr uint32_t kLine = EP_LINE_BYTES;
constexpr uint32_t kLanesPerLine = 8;
constexpr uint32_t kLinesPerWarp = 32 / kLanesPerLine;

__host__ __device__ constexpr uint32_t div_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// How a row of `body` 16-byte units and `scales` 8-byte units fills lines.
struct RowShape {
  uint32_t body;
  uint32_t scales;
  __host__ __device__ constexpr uint32_t lines() const { return div_up(2 * body + scales, 15); }
  // Body units in the 16-byte pieces; the rest goes in halves.
  __host__ __device__ constexpr uint32_t whole() const {
    return body < 7 * lines() ? body : 7 * lines();
  }
};

__host__ __device__ constexpr RowShape bf16_row(uint32_t hidden) { return {hidden / 8, 0}; }

struct LaneInLine {
  uint32_t line;   // of the four that the warp handles at once
  uint32_t piece;  // 0..=7
  __device__ __forceinline__ LaneInLine()
      : line((threadIdx.x % 32) / kLanesPerLine), piece(threadIdx.x % kLanesPerLine) {}
  __device__ __forceinline__ bool last() const { return piece == kLanesPerLine - 1; }
};

// The epoch stands in the upper half of the last piece.
__device__ __forceinline__ uint4 seal(uint2 data, uint64_t epoch) {
  return {data.x, data.y, static_cast<uint32_t>(epoch), static_cast<uint32_t>(epoch >> 32)};
}

__device__ __forceinline__ bool sealed(uint4 piece, uint64_t epoch) {
  return piece.z == static_cast<uint32_t>(epoch) && piece.w == static_cast<uint32_t>(epoch >> 32);
}

// Whether it is of a later epoch: its writer has not waited for this rank.
__device__ __forceinline__ bool has_passed(uint4 piece, uint64_t epoch) {
  return (uint64_t{piece.w} << 32 | piece.z) > epoch;
}

// An 8-byte packet: a value that carries its own epoch.
__device__ __forceinline__ uint64_t packet(uint32_t value, uint64_t epoch) {
  return static_cast<uint64_t>(static_cast<uint32_t>(epoch)) << 32 | value;
}

__device__ __forceinline__ bool packet_is(uint64_t p, uint64_t epoch) {
  return static_cast<uint32_t>(p >> 32) == static_cast<uint32_t>(epoch);
}

__device__ __forceinline__ bool packet_has_passed(uint64_t p, uint64_t epoch) {
  return static_cast<int32_t>(static_cast<uint32_t>(p >> 32) - static_cast<uint32_t>(epoch)) > 0;
}

}  // namespace ep
