// The group as a kernel sees it: peers, this buffer's control block, faults, bounded waits.
#pragma once

#include <cstddef>

#include "arch/memory.cuh"
#include "arch/sync.cuh"
#include "ep_kernels.h"
#include "line.cuh"

namespace ep {

// A part of an operation that can be launched alone has its own epoch.
enum Part : uint32_t { kDispatchSend, kDispatchRecv, kCombineSend, kCombineRecv, kBarrier, kParts };

struct PartState {
  uint64_t epoch;  // operations begun
  // By epoch parity: when the first slow wait began, an even number; 0 before; EP_ABORTED once the
  // host has called operations off.
  uint64_t start[2];
  uint32_t arrived;  // blocks that have read `epoch`
  uint32_t padding;
};

// Behind the participation table, at a multiple of 128 bytes. Then, per part and peer, one verdict.
struct ControlFixed {
  PartState part[kParts];
  uint64_t faults;               // records begun so far
  uint64_t any_verdict[kParts];  // epoch << 2 of the last operation in which a peer was closed
  uint64_t fault_laps[EP_FAULT_RING];  // records completed in each place of the ring
};
static_assert(sizeof(ControlFixed) <= EP_CONTROL_FIXED_BYTES - 128);
static_assert(kParts == EP_CONTROL_WAITS && EP_ABORTED == 1);
static_assert(offsetof(PartState, start) == EP_CONTROL_WAIT(0, 0));
static_assert(sizeof(PartState) == EP_CONTROL_WAIT(0, 1) - EP_CONTROL_WAIT(0, 0));

// What the group agreed on a peer in one operation: epoch << 2 | verdict.
enum Verdict : uint64_t { kOpen = 0, kClosing = 1, kPresent = 2, kGivenUp = 3 };

struct Control {
  uint8_t* base;
  uint32_t ranks;

  __device__ __forceinline__ explicit Control(const ep_group& g)
      : base(reinterpret_cast<uint8_t*>(g.control)), ranks(g.num_ranks) {}

  __device__ __forceinline__ uint32_t active(uint32_t rank) const {
    return reinterpret_cast<const uint32_t*>(base)[rank];
  }
  __device__ __forceinline__ ControlFixed* fixed() const {
    return reinterpret_cast<ControlFixed*>(base + ((4 * ranks + 127) & ~127u));
  }
  __device__ __forceinline__ PartState* part(Part p) const { return &fixed()->part[p]; }
  // Verdict words are shared by the waits of one part.
  __device__ __forceinline__ uint64_t* verdict(Part p, uint32_t rank) const {
    return reinterpret_cast<uint64_t*>(fixed() + 1) + p * ranks + rank;
  }
  // One word to look at beside the data: whether any peer is closed in this operation.
  __device__ __forceinline__ uint64_t* any_verdict(Part p) const {
    return &fixed()->any_verdict[p];
  }
  // The last epoch in which a fault of a peer was recorded, so that it is recorded once.
  __device__ __forceinline__ uint64_t* reported(Part p, uint32_t rank) const {
    return reinterpret_cast<uint64_t*>(fixed() + 1) + (kParts + p) * ranks + rank;
  }
};
static_assert(2 * kParts * sizeof(uint64_t) + sizeof(uint32_t) <= 128,
              "per rank in EP_CONTROL_BYTES");

// This operation's epoch.
__device__ __forceinline__ uint64_t epoch_of(const Control& control, Part p) {
  return arch::ld_relaxed_gpu_u64(&control.part(p)->epoch) + 1;
}

// Ends the operation's claim on its epoch. Called once by every block after it has read the epoch
// and off the path of its data; the last block advances the epoch for the next operation, which the
// stream starts after this one.
__device__ __forceinline__ void advance(const Control& control, Part p, uint64_t epoch) {
  PartState* s = control.part(p);
  uint64_t* next_start = &s->start[(epoch + 1) & 1];
  // Seldom anything but 0, and to write in vain would take longer.
  const uint64_t before = arch::ld_relaxed_gpu_u64(next_start);
  if (arch::atom_add_acq_rel_gpu_u32(&s->arrived, 1) == gridDim.x - 1) {
    s->arrived = 0;
    if (before != 0) arch::red_and_relaxed_gpu_u64(next_start, EP_ABORTED);  // a time to 0
    arch::st_relaxed_gpu_u64(&s->epoch, epoch);
  }
}

__device__ __forceinline__ uint32_t op_of(Part p) {
  return p <= kDispatchRecv ? EP_OP_DISPATCH : p <= kCombineRecv ? EP_OP_COMBINE : EP_OP_BARRIER;
}

__device__ __forceinline__ void record_fault(const ep_group& g, Part p, uint64_t epoch,
                                             uint32_t fault, uint32_t phase, uint32_t peer,
                                             uint64_t token, int64_t value) {
  const Control control(g);
  ControlFixed* fixed = control.fixed();
  const uint64_t n = arch::atom_add_relaxed_gpu_u64(&fixed->faults, 1);
  const uint32_t place = n % EP_FAULT_RING;
  // Whoever writes to this place first has already begun.
  while (arch::ld_acquire_gpu_u64(&fixed->fault_laps[place]) != n / EP_FAULT_RING) {
  }
  ep_fault* f = reinterpret_cast<ep_fault*>(g.faults) + place;
  // A reader that sees 0, or another sequence after than before, drops the record.
  arch::st_relaxed_sys_u64(&f->sequence, 0);
  arch::fence_acq_rel_sys();  // before anything of the new record
  f->epoch = epoch;
  f->fault = fault;
  f->op = op_of(p);
  f->phase = phase;
  f->peer = peer;
  f->token = token;
  f->value = value;
  arch::st_release_sys_u64(&f->sequence, n + 1);
  arch::st_release_gpu_u64(&fixed->fault_laps[place], n / EP_FAULT_RING + 1);
}

// At most one record of this peer in this part of this operation.
__device__ __forceinline__ void record_peer_fault(const ep_group& g, Part p, uint64_t epoch,
                                                  uint32_t fault, uint32_t phase, uint32_t peer,
                                                  uint64_t token, int64_t value) {
  const Control control(g);
  if (arch::atom_max_relaxed_gpu_u64(control.reported(p, peer), epoch) < epoch)
    record_fault(g, p, epoch, fault, phase, peer, token, value);
}

// Ranks that a token can go to.
__host__ __device__ __forceinline__ uint32_t most_destinations(const ep_group& g, uint32_t top_k) {
  return top_k < g.num_ranks ? top_k : g.num_ranks;
}

__device__ __forceinline__ uint64_t peer_base(const ep_group& g, uint32_t rank) {
  return reinterpret_cast<const uint64_t*>(g.peer_table)[rank];
}

// Base of a rank's symmetric buffer if this rank exchanges with it in this operation, else 0.
__device__ __forceinline__ uint64_t partner_base(const ep_group& g, const Control& control,
                                                 uint32_t rank) {
  const uint64_t base = peer_base(g, rank);
  return control.active(rank) != 0 ? base : 0;
}

// Nanoseconds since the first slow wait of this part of this operation. All blocks share that
// start, so that they give up at the same moment. Beyond every bound once the host has called
// operations off: a wait has only this to look at.
__device__ __forceinline__ uint64_t waited_ns(const ep_group& g, Part p, uint64_t epoch) {
  uint64_t* slot = &Control(g).part(p)->start[epoch & 1];
  const uint64_t now = (arch::globaltimer_ns() | 2) & ~uint64_t{EP_ABORTED};
  uint64_t start = arch::ld_relaxed_gpu_u64(slot);
  if (start == 0) {
    const uint64_t old = arch::atom_cas_acq_rel_gpu_u64(slot, 0, now);
    start = old == 0 ? now : old;
  }
  return start == EP_ABORTED ? UINT64_MAX : now > start ? now - start : 0;
}

__device__ __forceinline__ void report_timeout(const ep_group& g, Part p, uint64_t epoch,
                                               uint32_t phase, uint32_t peer) {
  const uint64_t waited = waited_ns(g, p, epoch);
  const bool aborted = waited == UINT64_MAX;
  record_peer_fault(g, p, epoch, aborted ? EP_FAULT_ABORTED : EP_FAULT_TIMEOUT, phase, peer, 0,
                    aborted ? 0 : static_cast<int64_t>(waited));
}

// Counts vain polls of one wait; looks at the clock only now and then, and not at all at first:
// with 64 polls some dispatches of 15 us took longer (docs/performance.md). Nor much later, because
// behind the bound every wait that is left takes as long as these, some hundred microseconds.
class Patience {
public:
  // Call after each vain poll. True once the operation's time is over.
  __device__ __forceinline__ bool expired(const ep_group& g, Part p, uint64_t epoch) {
    if (--polls_ != 0) [[likely]]
      return false;
    polls_ = 64;
    return waited_ns(g, p, epoch) >= g.timeout_ns;
  }

private:
  uint32_t polls_ = 1024;
};

// Whether blocks may take what a peer sent at face value, by a verdict word read beside the data.
__device__ __forceinline__ bool is_open(uint64_t verdict, uint64_t epoch) {
  return verdict >> 2 != epoch;
}

// While this passes, loads and stores that are under way finish.
__device__ __forceinline__ void sleep_grace() {
  constexpr uint64_t kGraceNs = 50000;
  const uint64_t until = arch::globaltimer_ns() + kGraceNs;
  while (arch::globaltimer_ns() < until) arch::sleep_ns(1000);
}

// All blocks must agree on whether a peer's counts came, because they place rows by them. A block
// that misses some first closes the peer: from then on no block accepts the counts by itself. After
// a grace it looks once more whether all `n` packets of the peer are there, and the first to say
// decides.
__device__ __forceinline__ bool decide_present(const ep_group& g, Part p, uint64_t epoch,
                                               uint32_t peer, const uint64_t* packets, uint32_t n) {
  uint64_t* word = Control(g).verdict(p, peer);
  const uint64_t closing = epoch << 2 | kClosing;
  uint64_t seen = arch::ld_acquire_gpu_u64(word);
  while (seen >> 2 != epoch) {
    const uint64_t old = arch::atom_cas_acq_rel_gpu_u64(word, seen, closing);
    if (old == seen) break;
    seen = old;
  }
  if (seen >> 2 == epoch && (seen & 3) != kClosing) return (seen & 3) == kPresent;
  arch::atom_max_relaxed_gpu_u64(Control(g).any_verdict(p), epoch << 2);
  arch::fence_sc_gpu();
  sleep_grace();
  bool here = true;
#pragma unroll 1
  for (uint32_t i = 0; here && i < n; ++i) {
    here = packet_is(arch::ld_acquire_sys_u64(packets + i), epoch);
  }
  const uint64_t mine = epoch << 2 | (here ? kPresent : kGivenUp);
  const uint64_t old = arch::atom_cas_acq_rel_gpu_u64(word, closing, mine);
  return ((old == closing ? mine : old) & 3) == kPresent;
}

}  // namespace ep
