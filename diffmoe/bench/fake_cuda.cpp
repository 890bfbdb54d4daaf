// A CUDA device without memory or kernels, for fake tensors where there is no GPU: autograd asks for the device's guard
// and its streams, and nothing else is ever called.  Loaded before torch looks for its hooks, after its CUDA library.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Under this name torch looks for the hooks of its CUDA library.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)

}  // namespace

namespace at::native {

// As a GPU chooses for bf16; without a choice torch takes the definition, whose N x N weights are kept.
int64_t flash_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 1;
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &flash_attention)

}  // namespace at::native

#ifdef WITHOUT_CUDA
// One kernel on a GPU; an operator without one would be taken apart.
at::Tensor silu_backward(const at::Tensor& gradient, const at::Tensor&) { return at::empty_like(gradient); }
TORCH_LIBRARY_IMPL(aten, CUDA, library) { library.impl("silu_backward", &silu_backward); }
#endif
