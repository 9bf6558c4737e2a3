// What the demo's experts need besides matrix products.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arch/fp8.cuh"
#include "launch.cuh"

namespace ep {
namespace {

constexpr uint32_t kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    dequantize(const __grid_constant__ ep_dequantize_args args) {
  const uint32_t row = blockIdx.x;
  const uint16_t* x = reinterpret_cast<const uint16_t*>(args.x) + uint64_t{row} * args.hidden / 2;
  const float* scales = reinterpret_cast<const float*>(args.scales) + row;
  __nv_bfloat162* out =
      reinterpret_cast<__nv_bfloat162*>(args.out) + uint64_t{row} * args.hidden / 2;
  for (uint32_t i = threadIdx.x; i < args.hidden / 2; i += kThreads) {
    const uint32_t halves = arch::cvt_f16x2_e4m3x2(x[i]);
    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    const float scale = scales[i / 64 * args.scale_stride];
    out[i] = __floats2bfloat162_rn(f.x * scale, f.y * scale);
  }
}

__global__ void __launch_bounds__(kThreads) swiglu(const __grid_constant__ ep_swiglu_args args) {
  const __nv_bfloat16* gate = reinterpret_cast<const __nv_bfloat16*>(args.gate_up) +
                              uint64_t{blockIdx.x} * 2 * args.intermediate;
  __nv_bfloat16* out =
      reinterpret_cast<__nv_bfloat16*>(args.out) + uint64_t{blockIdx.x} * args.intermediate;
  for (uint32_t i = threadIdx.x; i < args.intermediate; i += kThreads) {
    const float g = __bfloat162float(gate[i]);
    const float u = __bfloat162float(gate[args.intermediate + i]);
    out[i] = __float2bfloat16_rn(g / (1.0f + expf(-g)) * u);
  }
}

}  // namespace
}  // namespace ep

cudaError_t ep::load_experts() { return load(dequantize, swiglu); }

extern "C" int32_t ep_dequantize_launch(const ep_dequantize_args* args, void* stream,
                                        int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || args->struct_size != sizeof(*args) ||
      args->hidden % EP_HIDDEN_MULTIPLE != 0)
    return EP_LAUNCH_BAD_ARGS;
  if (args->rows == 0) return EP_LAUNCH_OK;
  const DeviceGuard device(args->device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  return status_of(launch(dequantize, args->rows, kThreads, 0, stream, *args), cuda_error);
}

extern "C" int32_t ep_swiglu_launch(const ep_swiglu_args* args, void* stream, int32_t* cuda_error) {
  using namespace ep;
  if (args == nullptr || args->struct_size != sizeof(*args)) return EP_LAUNCH_BAD_ARGS;
  if (args->rows == 0) return EP_LAUNCH_OK;
  const DeviceGuard device(args->device);
  if (device.error() != cudaSuccess) return status_of(device.error(), cuda_error);
  return status_of(launch(swiglu, args->rows, kThreads, 0, stream, *args), cuda_error);
}
