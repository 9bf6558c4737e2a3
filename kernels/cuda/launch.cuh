// What launchers share on the host side.
#pragma once

#include <cuda_runtime.h>

#include "ep_kernels.h"

namespace ep {

// Makes a device current and gives back the caller's.
class DeviceGuard {
public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

inline int32_t status_of(cudaError_t e, int32_t* cuda_error) {
  if (cuda_error != nullptr) *cuda_error = static_cast<int32_t>(e);
  if (e == cudaSuccess) return EP_LAUNCH_OK;
  return e == cudaErrorNoKernelImageForDevice ? EP_LAUNCH_UNSUPPORTED : EP_LAUNCH_CUDA_ERROR;
}

inline bool group_is_sound(const ep_group& g) {
  return g.peer_table != 0 && g.control != 0 && g.faults != 0 && g.timeout_ns != 0 &&
         g.num_ranks >= 1 && g.num_ranks <= EP_MAX_RANKS && g.rank < g.num_ranks &&
         g.num_experts % g.num_ranks == 0 && g.num_experts >= g.num_ranks &&
         g.num_experts <= EP_MAX_EXPERTS && g.max_tokens >= 1 && g.max_tokens <= EP_MAX_TOKENS &&
         g.hidden >= EP_HIDDEN_MULTIPLE && g.hidden % EP_HIDDEN_MULTIPLE == 0 && g.max_top_k >= 1 &&
         g.max_top_k <= EP_MAX_TOP_K;
}

inline bool handle_is_sound(const ep_handle& h, const ep_group& g, const ep_layout& l) {
  return h.route != 0 && h.recv_map != 0 && h.recv_rows != 0 && h.slot < l.slots && l.ring != 0 &&
         (l.ring & (l.ring - 1)) == 0 && h.num_tokens <= g.max_tokens && h.top_k >= 1 &&
         h.top_k <= g.max_top_k;
}

// One block on each multiprocessor, or on as many as the caller allows: blocks wait for peers, so
// all of them must be able to run at once.
inline cudaError_t grid_for(const ep_group& g, unsigned* grid) {
  int sms = 0;
  const cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, g.device);
  if (e != cudaSuccess) return e;
  *grid = g.num_sms == 0 || g.num_sms > static_cast<unsigned>(sms) ? static_cast<unsigned>(sms)
                                                                   : g.num_sms;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// Loads kernels onto the current device.
template <class... Kernel>
cudaError_t load(Kernel*... kernels) {
  cudaError_t e = cudaSuccess;
  cudaFuncAttributes attributes;
  ((e = e == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : e), ...);
  return e;
}

// Each file's kernels.
cudaError_t load_dispatch();
cudaError_t load_combine();
cudaError_t load_barrier();
cudaError_t load_empty();
cudaError_t load_experts();

}  // namespace ep
