// SPDX-License-Identifier: BSD-3-Clause
// The persistent kernels whose storage is __nv_bfloat16.
#include "persistent_forward.cuh"

namespace fastrnn {

template <template <typename> class Cell, typename scalar_t>
CudaStatus launch_persistent_forward(const PersistentForward<scalar_t>& p, Arithmetic, CudaStream stream) {
  return launch_forward<Cell, Products16<scalar_t>>(p, stream);
}

#define FASTRNN_INSTANTIATE(name, Cell) \
  template CudaStatus launch_persistent_forward<Cell>(const PersistentForward<__nv_bfloat16>&, Arithmetic, CudaStream);
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)

}  // namespace fastrnn
