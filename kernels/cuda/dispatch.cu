// Dispatch: every token once to each rank that owns one of its experts, spread there over the
// experts.
//
// Warps of a block have one task each; what other blocks of this rank send is waited for like what
// other ranks send:
//   senders   quantise, and store whole lines to the peers;
//   a router  gives each token its slots, so that the same input gives the same bits: a slot is a
//             prefix sum in token order;
//   readers   poll all sources' counts and sum them to where each source's rows begin;
//   placers   count the entries before the block's tokens, then take rows' lines as they arrive and
//             copy them to the rows' experts; so does every warp that has done its own task.
// The last block tells every rank its counts.
//
// What a multiprocessor loads waits behind what it has stored to peers, for as long as the links
// take for that. So where it was measured to be faster (Division), the first blocks only send,
// each of them a few tokens in turn, and the others only place: rows then arrive one after the
// other, are found at once, and are copied while the next ones are on the wire. Elsewhere all
// blocks do both.
//
// With few tokens the time is that of dependent instructions, of which a warp does one in about ten
// cycles, while the block's other warps take the issue slots in between. So each task is one
// stretch of code without divergent branches, has done all that it can before it waits, and waits
// only for what it needs; and a warp that has nothing to do sleeps at a barrier, it does not poll.
//
// The parts are in dispatch/, which nothing else includes.

#include "dispatch/count.cuh"
#include "dispatch/place.cuh"
#include "dispatch/read.cuh"
#include "dispatch/route.cuh"
#include "dispatch/send.cuh"
#include "launch.cuh"

namespace ep {
namespace {

// What all tasks need of the control block. One warp.
struct ControlLoad {
  uint64_t epoch = 0;    // lane 0: of the send part, lane 1: of the receive part
  uint64_t partner = 0;  // the lane's rank
  uint32_t active = 0;

  __device__ __forceinline__ ControlLoad() {}
  __device__ __forceinline__ ControlLoad(const ep_group& g, const Control& control) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < g.num_ranks) {
      partner = peer_base(g, lane);
      active = control.active(lane);
    }
    if (lane < 2) epoch = epoch_of(control, lane == 0 ? kDispatchSend : kDispatchRecv);
  }
  template <class P>
  __device__ __forceinline__ void keep(const P& p, const Shared& s, const Control& control) const {
    const ep_group& g = p.a.group;
    const uint32_t lane = threadIdx.x % 32;
    Fixed* fixed = shared_at<Fixed>(s.fixed);
    uint64_t* partners = shared_at<uint64_t>(s.partners);
    if (lane == 0) fixed->send_epoch = epoch;
    if (lane == 1) fixed->recv_epoch = epoch;
    if (lane < g.num_ranks) partners[lane] = active != 0 ? partner : 0;
#pragma unroll 1
    for (uint32_t r = 32 + lane; r < g.num_ranks; r += 32)
      partners[r] = partner_base(g, control, r);
    arch::mbarrier_arrive_release_cta(&fixed->known);
  }
};

template <uint32_t H, bool FP8, class W>
__global__ void __launch_bounds__(W::kThreads, 1)
    dispatch(const __grid_constant__ ep_dispatch_args args, const __grid_constant__ Plan plan) {
  constexpr uint32_t kRouterWarp = W::kRouterWarp;
  constexpr uint32_t kFirstReader = W::kFirstReader;
  const Problem<H, FP8, W> p(args, plan);
  const ep_group& g = args.group;
  const Control control(g);
  const Shared& s = plan.shared;
  Fixed* fixed = shared_at<Fixed>(s.fixed);
  const bool sends = (args.flags & EP_DISPATCH_SEND) != 0;
  const bool receives = (args.flags & EP_DISPATCH_RECV) != 0;
  const bool places = receives && blockIdx.x >= plan.first_placing;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  const Chunk chunk(p);
  const bool has_tokens = sends && chunk.size() != 0;
  const bool counts = has_tokens || (sends && tells_counts(p));

  // What tasks need first is on its way while the block meets.
  Group16 x;
  RouterLoad entry;
  TokenIds ids;
  ControlLoad known;
  if (warp < kSenderWarps) {
    // bf16 is not needed before its routes are, which need the ids first.
    if (FP8 && has_tokens) x = load_group(p, chunk.from, threadIdx.x);
  } else if (warp < kRouterWarp) {
    if (counts) {
      ids = load_ids(p, 0, chunk.from);
      clear<W>(s.rank_rows, s.row_base);
      // The scales of a row may end within a piece of a line.
      if (FP8) {
#pragma unroll
        for (uint32_t i = 0; i < kPlaces; ++i) {
          const uint32_t row = s.rows + i * Shared::quantised_bytes(p.hidden());
          clear<W>(row, row + Shared::scale_bytes(p.hidden()));
        }
      }
    }
  } else if (warp == kRouterWarp) {
    if (has_tokens) entry = RouterLoad(p, chunk, chunk.from);
  } else if (warp == kFirstReader) {
    known = ControlLoad(g, control);
  } else if (threadIdx.x == 32 * kFirstReader + 32) {
    arch::mbarrier_init(&fixed->known, 32);
    arch::mbarrier_init(&fixed->counted, W::kPlacers);
    for (uint32_t i = 0; i < kPlaces; ++i) {
      arch::mbarrier_init(&fixed->routed[i], 32);
      arch::mbarrier_init(&fixed->sent[i], kSenders);
    }
    arch::mbarrier_init(&fixed->placeable, W::kReaders);
    fixed->units_taken = W::kPlacerWarps;
  }
  __syncthreads();

  // To advance an epoch is to wait for all that the multiprocessor has stored so far, so it is done
  // early, and by a warp that has nothing else to do yet.
  if (warp == (has_tokens ? kFirstReader + 1 : kRouterWarp)) {
    await(&fixed->known, 0);
    if (lane == 0 && sends) advance(control, kDispatchSend, fixed->send_epoch);
    if (lane == 1 && receives) advance(control, kDispatchRecv, fixed->recv_epoch);
    __syncwarp();
  }
  if (warp < kSenderWarps) {
    if (has_tokens) send(p, s, chunk, x);
  } else if (warp < kRouterWarp) {
    if (counts) count(p, s, chunk, ids);
  } else if (warp == kRouterWarp) {
    if (has_tokens) route(p, s, chunk, entry);
  } else {
    if (warp == kFirstReader) known.keep(p, s, control);
    if (places) {
      await(&fixed->known, 0);
      read_counts(p, s, fixed->recv_epoch);
      if (blockIdx.x == plan.first_placing) write_counts(p, s, fixed->recv_epoch);
    }
  }
  if (places) {
    await(&fixed->known, 0);
    place(p, s, fixed->recv_epoch);
  }
}

struct DispatchKernel {
  void (*kernel)(const ep_dispatch_args, const Plan);
  uint32_t threads;
  uint32_t unit_lines;
};

template <uint32_t H, bool FP8, class W>
constexpr DispatchKernel kKernel = {dispatch<H, FP8, W>, W::kThreads, W::kUnitLines};

template <bool FP8, class W>
const DispatchKernel& kernel_for(uint32_t hidden) {
  switch (hidden) {
  case 3584: return kKernel<3584, FP8, W>;
  case 7168: return kKernel<7168, FP8, W>;
  default: return kKernel<0, FP8, W>;
  }
}

// Both ways give the same bits.
const DispatchKernel& kernel_for(uint32_t hidden, bool fp8, bool few_tokens) {
  if (fp8)
    return few_tokens ? kernel_for<true, FewTokens>(hidden) : kernel_for<true, ManyTokens>(hidden);
  return few_tokens ? kernel_for<false, FewTokens>(hidden) : kernel_for<false, ManyTokens>(hidden);
}

// Loads every kernel of a way onto the current device.
template <class W>
cudaError_t load_way() {
  return load(dispatch<3584, false, W>, dispatch<3584, true, W>, dispatch<7168, false, W>,
              dispatch<7168, true, W>, dispatch<0, false, W>, dispatch<0, true, W>);
}

bool is_sound(const ep_dispatch_args& a) {
  constexpr uint32_t kParts = EP_DISPATCH_SEND | EP_DISPATCH_RECV;
  constexpr uint32_t kFlags =
      kParts | EP_DISPATCH_FP8 | EP_DISPATCH_WEIGHTS | EP_DISPATCH_POW2 | EP_DISPATCH_UE8M0;
  if (a.struct_size != sizeof(a) || (a.flags & kParts) == 0 || !group_is_sound(a.group) ||
      !handle_is_sound(a.handle, a.group, a.layout) || !aligned_for_vectors(a.x, a.recv_x))
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
  const cudaError_t e = load_way<FewTokens>();
  return e != cudaSuccess ? e : load_way<ManyTokens>();
}

extern "C" int32_t ep_dispatch_launch(const ep_dispatch_args* args, void* stream,
                                      int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || !is_sound(*args)) return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->group.device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  const bool fp8 = (args->flags & EP_DISPATCH_FP8) != 0;
  unsigned grid = 0;
  cudaError_t e = grid_for(args->group, &grid);
  if (e != cudaSuccess) return status_of(e, cuda_error);
  const Division division(*args, grid);
  const DispatchKernel& k = kernel_for(args->group.hidden, fp8, division.few_tokens);
  const Plan plan(*args, fp8, k.unit_lines, division);
  const int32_t status = allow_shared(k.kernel, plan.shared.bytes, args->group.device, cuda_error);
  if (status != EP_LAUNCH_OK) return status;
  e = launch(k.kernel, grid, k.threads, plan.shared.bytes, stream, *args, plan);
  return status_of(e, cuda_error);
}
