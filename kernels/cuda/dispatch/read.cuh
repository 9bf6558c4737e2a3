// The readers' task: what each source sends, and where its rows begin.
#pragma once

#include "arch/predicated.cuh"
#include "dispatch/plan.cuh"

namespace ep {
namespace {

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

}  // namespace
}  // namespace ep
