// SPDX-License-Identifier: BSD-3-Clause
// Hands a launch to the kernels of the instruction set in use.
#include "../kernels.h"
#include "isa.h"

namespace fastrnn {

#define FASTRNN_DECLARE(isa)                                                    \
  namespace isa {                                                               \
  template <template <typename> class Cell, typename scalar_t>                  \
  void sequence_forward(const SequenceForward<scalar_t>&, const ThreadPool&);   \
  template <template <typename> class Cell, typename scalar_t>                  \
  void sequence_backward(const SequenceBackward<scalar_t>&, const ThreadPool&); \
  }
FASTRNN_DECLARE(portable)
FASTRNN_DECLARE(avx2)
FASTRNN_DECLARE(avx512)
#undef FASTRNN_DECLARE

template <template <typename> class Cell, typename scalar_t>
void sequence_forward_cpu(const SequenceForward<scalar_t>& p, const ThreadPool& pool) {
  switch (best_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::sequence_forward<Cell>(p, pool);
    case Isa::avx2:
      return avx2::sequence_forward<Cell>(p, pool);
#endif
    default:
      return portable::sequence_forward<Cell>(p, pool);
  }
}

template <template <typename> class Cell, typename scalar_t>
void sequence_backward_cpu(const SequenceBackward<scalar_t>& p, const ThreadPool& pool) {
  switch (best_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::sequence_backward<Cell>(p, pool);
    case Isa::avx2:
      return avx2::sequence_backward<Cell>(p, pool);
#endif
    default:
      return portable::sequence_backward<Cell>(p, pool);
  }
}

#define FASTRNN_INSTANTIATE(name, Cell)                                                         \
  template void sequence_forward_cpu<Cell>(const SequenceForward<float>&, const ThreadPool&);   \
  template void sequence_forward_cpu<Cell>(const SequenceForward<double>&, const ThreadPool&);  \
  template void sequence_backward_cpu<Cell>(const SequenceBackward<float>&, const ThreadPool&); \
  template void sequence_backward_cpu<Cell>(const SequenceBackward<double>&, const ThreadPool&);
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE

}  // namespace fastrnn
