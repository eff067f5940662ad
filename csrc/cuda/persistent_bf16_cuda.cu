// SPDX-License-Identifier: BSD-3-Clause
// The persistent kernels whose storage is __nv_bfloat16.
#include "persistent_backward.cuh"
#include "persistent_forward.cuh"

namespace fastrnn {

template <template <typename> class Cell, typename scalar_t>
CudaStatus launch_persistent_forward(const PersistentForward<scalar_t>& p, Arithmetic, CudaStream stream) {
  using Products = Products16<scalar_t>;
  return launch_persistent<ForwardPass<Cell, Products>, Products>(p, stream);
}

template <template <typename> class Cell, typename scalar_t>
CudaStatus launch_persistent_backward(const PersistentBackward<scalar_t>& p, Arithmetic, CudaStream stream) {
  using Products = Products16<scalar_t>;
  return launch_persistent<BackwardPass<Cell, Products>, Products>(p, stream);
}

#define FASTRNN_INSTANTIATE(name, Cell)                                                                      \
  template CudaStatus launch_persistent_forward<Cell>(const PersistentForward<__nv_bfloat16>&, Arithmetic,   \
                                                      CudaStream);                                           \
  template CudaStatus launch_persistent_backward<Cell>(const PersistentBackward<__nv_bfloat16>&, Arithmetic, \
                                                       CudaStream);
FASTRNN_FOR_EACH_TORCH_CELL(FASTRNN_INSTANTIATE)

}  // namespace fastrnn
