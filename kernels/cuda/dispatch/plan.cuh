// What the host works out for a dispatch, from its shape alone, and what all tasks derive from it.
#pragma once

#include "dispatch/block.cuh"
#include "divisor.cuh"

namespace ep {
namespace {

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

}  // namespace
}  // namespace ep
