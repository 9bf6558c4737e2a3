// What launchers share on the host side.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "ep_kernels.h"

namespace ep {

// Makes a device current and gives back the context that the thread had.
//
// Whether it had one, cudaGetDevice does not tell: it says 0 in a thread that has none. To set
// device 0 there afterwards would make a context on a GPU that may be another rank's, because
// cudaSetDevice makes one since CUDA 12. So the driver is asked, by entry points that the runtime
// hands out, and a thread without a context is left with the device's. A thread that is on the
// device is asked nothing more, and such is every thread that was left with it.
class DeviceGuard {
public:
  explicit DeviceGuard(int device) {
    int before = 0;
    error_ = cudaGetDevice(&before);
    if (error_ != cudaSuccess || before == device) return;
    error_ = entries().error;
    if (error_ != cudaSuccess) return;
    // Refused only while the driver is not initialised, and then there is none.
    if (entries().get_current(&before_) != CUDA_SUCCESS) before_ = nullptr;
    error_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    // Not by cudaSetDevice: it need not be its device's primary context.
    if (before_ != nullptr) entries().set_current(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

private:
  struct Entries {
    PFN_cuCtxGetCurrent_v4000 get_current = nullptr;
    PFN_cuCtxSetCurrent_v4000 set_current = nullptr;
    cudaError_t error;

    Entries() {
      error = find("cuCtxGetCurrent", &get_current);
      if (error == cudaSuccess) error = find("cuCtxSetCurrent", &set_current);
    }

    template <class Entry>
    static cudaError_t find(const char* name, Entry* entry) {
      // In CUDA 12 both are what they were in CUDA 4, which the types name.
      constexpr unsigned version = 12000;
      void* found = nullptr;
      cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
      const cudaError_t e =
          cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
      if (e != cudaSuccess) return e;
      if (result != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
      *entry = reinterpret_cast<Entry>(found);
      return cudaSuccess;
    }
  };

  static const Entries& entries() {
    static const Entries entries;
    return entries;
  }

  CUcontext before_ = nullptr;
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
         g.num_experts <= EP_MAX_EXPERTS && g.num_experts / g.num_ranks <= EP_MAX_LOCAL_EXPERTS &&
         g.max_tokens >= 1 && g.max_tokens <= EP_MAX_TOKENS && g.hidden >= EP_HIDDEN_MULTIPLE &&
         g.hidden <= EP_MAX_HIDDEN && g.hidden % EP_HIDDEN_MULTIPLE == 0 && g.max_top_k >= 1 &&
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

// Whether kernels can use the memory at these addresses 16 bytes at a time.
inline bool aligned_for_vectors(uint64_t a, uint64_t b) { return ((a | b) & 15) == 0; }

// Launches a kernel. The error is this launch's: cudaGetLastError after <<<>>> may be that of any
// earlier call of the thread, and then says of a kernel that runs that it does not.
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), unsigned grid, unsigned threads, size_t shared,
                   void* stream, const Params&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Lets a kernel have more shared memory than it may by default: all that the device has, because
// the limit is the kernel's, and another thread may be about to launch it with more than `bytes`.
// Returns a launcher's status.
template <class Kernel>
int32_t allow_shared(Kernel* kernel, size_t bytes, int device, int32_t* cuda_error) {
  if (bytes <= 48 * 1024) return EP_LAUNCH_OK;
  int most = 0;
  cudaError_t e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e == cudaSuccess && bytes > static_cast<size_t>(most)) return EP_LAUNCH_TOO_LARGE;
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return status_of(e, cuda_error);
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
