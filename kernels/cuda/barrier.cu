// A barrier of all ranks on the device: lines ranks up, for timing and for tests.

#include "arch/shared.cuh"
#include "group.cuh"
#include "launch.cuh"
#include "line.cuh"

namespace ep {
namespace {

constexpr uint32_t kThreads = 128;

__global__ void __launch_bounds__(kThreads) barrier(const __grid_constant__ ep_barrier_args args) {
  EP_SHARED(uint64_t, shared_epoch);
  const ep_group& g = args.group;
  const Control control(g);
  if (threadIdx.x == 0) {
    const uint64_t until = arch::globaltimer_ns() + args.spin_ns;
    while (arch::globaltimer_ns() < until) {
    }
    shared_epoch = epoch_of(control, kBarrier);
    advance(control, kBarrier, shared_epoch);
  }
  __syncthreads();
  const uint64_t epoch = shared_epoch;
  for (uint32_t r = threadIdx.x; r < g.num_ranks; r += kThreads) {
    const uint64_t peer = partner_base(g, control, r);
    if (peer == 0) continue;
    arch::st_release_sys_u64(reinterpret_cast<void*>(peer + args.layout.barrier + g.rank * kLine),
                             epoch);
  }
  for (uint32_t r = threadIdx.x; r < g.num_ranks; r += kThreads) {
    if (partner_base(g, control, r) == 0) continue;
    const void* from =
        reinterpret_cast<const void*>(peer_base(g, g.rank) + args.layout.barrier + r * kLine);
    Patience patience;
    // A peer may already be at a later barrier.
    while (arch::ld_acquire_sys_u64(from) < epoch) {
      if (patience.expired(g, kBarrier, epoch)) {
        report_timeout(g, kBarrier, epoch, EP_PHASE_BARRIER, r);
        break;
      }
    }
  }
}

}  // namespace
}  // namespace ep

cudaError_t ep::load_barrier() { return load(barrier); }

extern "C" int32_t ep_barrier_launch(const ep_barrier_args* args, void* stream,
                                     int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || args->struct_size != sizeof(*args) || !group_is_sound(args->group))
    return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->group.device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  return status_of(launch(barrier, 1, kThreads, 0, stream, *args), cuda_error);
}
