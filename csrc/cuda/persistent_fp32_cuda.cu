// SPDX-License-Identifier: BSD-3-Clause
// The persistent kernels whose storage is float.
#include "persistent_backward.cuh"
#include "persistent_forward.cuh"

namespace fastrnn {

template <template <typename> class Cell, typename scalar_t>
CudaStatus launch_persistent_forward(const PersistentForward<scalar_t>& p, Arithmetic arithmetic, CudaStream stream) {
  return arithmetic == Arithmetic::tf32 ? launch_persistent<ForwardPass<Cell, ProductsTf32>, ProductsTf32>(p, stream)
                                        : launch_persistent<ForwardPass<Cell, ProductsFp32>, ProductsFp32>(p, stream);
}

template <template <typename> class Cell, typename scalar_t>
CudaStatus launch_persistent_backward(const PersistentBackward<scalar_t>& p, Arithmetic arithmetic, CudaStream stream) {
  return arithmetic == Arithmetic::tf32 ? launch_persistent<BackwardPass<Cell, ProductsTf32>, ProductsTf32>(p, stream)
                                        : launch_persistent<BackwardPass<Cell, ProductsFp32>, ProductsFp32>(p, stream);
}

#define FASTRNN_INSTANTIATE(name, Cell)                                                                         \
  template CudaStatus launch_persistent_forward<Cell>(const PersistentForward<float>&, Arithmetic, CudaStream); \
  template CudaStatus launch_persistent_backward<Cell>(const PersistentBackward<float>&, Arithmetic, CudaStream);
FASTRNN_FOR_EACH_TORCH_CELL(FASTRNN_INSTANTIATE)

}  // namespace fastrnn
