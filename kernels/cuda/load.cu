// What concerns all kernels at once.

#include "launch.cuh"

extern "C" uint32_t ep_kernels_abi_version(void) { return EP_KERNELS_ABI_VERSION; }

extern "C" int32_t ep_kernels_load(int32_t device, int32_t* cuda_error) {
  using namespace ep;
  const DeviceGuard guard(device);
  cudaError_t e = guard.error();
  if (e == cudaSuccess) e = load_dispatch();
  if (e == cudaSuccess) e = load_combine();
  if (e == cudaSuccess) e = load_barrier();
  if (e == cudaSuccess) e = load_empty();
  if (e == cudaSuccess) e = load_experts();
  return status_of(e, cuda_error);
}
