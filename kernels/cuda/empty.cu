// A kernel without work: what timing a launch costs by itself.

#include "launch.cuh"

namespace ep {
namespace {

__global__ void empty() {}

}  // namespace
}  // namespace ep

cudaError_t ep::load_empty() { return load(empty); }

extern "C" int32_t ep_empty_launch(const ep_empty_args* args, void* stream, int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || args->struct_size != sizeof(*args)) return EP_LAUNCH_BAD_ARGS;
  const DeviceGuard device(args->device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  return status_of(launch(empty, 1, 32, 0, stream), cuda_error);
}
