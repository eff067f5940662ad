// SPDX-License-Identifier: BSD-3-Clause
// Hands a launch to the kernels of the instruction set in use.
#include <type_traits>

#include "../kernels.h"
#include "isa.h"

namespace fastrnn {

#define FASTRNN_DECLARE(isa)                                                    \
  namespace isa {                                                               \
  template <template <typename> class Cell, typename scalar_t>                  \
  void sequence_forward(const SequenceForward<scalar_t>&, const ThreadPool&);   \
  template <template <typename> class Cell, typename scalar_t>                  \
  void sequence_backward(const SequenceBackward<scalar_t>&, const ThreadPool&); \
  template <typename scalar_t>                                                  \
  void input_gradient(const InputGradient<scalar_t>&, const ThreadPool&);       \
  template <typename scalar_t>                                                  \
  void weight_gradient(const WeightGradient<scalar_t>&, const ThreadPool&);     \
  }
FASTRNN_DECLARE(portable)
FASTRNN_DECLARE(avx2)
FASTRNN_DECLARE(avx512)
FASTRNN_DECLARE(avx512_bf16)
#undef FASTRNN_DECLARE

#if defined(__x86_64__)
#define FASTRNN_DISPATCH(function)                \
  if constexpr (std::is_same_v<scalar_t, Bf16>) { \
    return avx512_bf16::function(p, pool);        \
  } else {                                        \
    switch (best_isa()) {                         \
      case Isa::avx512_bf16:                      \
      case Isa::avx512:                           \
        return avx512::function(p, pool);         \
      case Isa::avx2:                             \
        return avx2::function(p, pool);           \
      default:                                    \
        return portable::function(p, pool);       \
    }                                             \
  }
#else
#define FASTRNN_DISPATCH(function) \
  if constexpr (!std::is_same_v<scalar_t, Bf16>) return portable::function(p, pool);
#endif

template <template <typename> class Cell, typename scalar_t>
void sequence_forward_cpu(const SequenceForward<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(sequence_forward<Cell>)
}
template <template <typename> class Cell, typename scalar_t>
void sequence_backward_cpu(const SequenceBackward<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(sequence_backward<Cell>)
}
template <typename scalar_t>
void input_gradient_cpu(const InputGradient<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(input_gradient)
}
template <typename scalar_t>
void weight_gradient_cpu(const WeightGradient<scalar_t>& p, const ThreadPool& pool){FASTRNN_DISPATCH(weight_gradient)}

#define FASTRNN_INSTANTIATE_CELL(Cell, scalar_t)                                                 \
  template void sequence_forward_cpu<Cell>(const SequenceForward<scalar_t>&, const ThreadPool&); \
  template void sequence_backward_cpu<Cell>(const SequenceBackward<scalar_t>&, const ThreadPool&);
#define FASTRNN_INSTANTIATE(name, Cell)  \
  FASTRNN_INSTANTIATE_CELL(Cell, float)  \
  FASTRNN_INSTANTIATE_CELL(Cell, double) \
  FASTRNN_INSTANTIATE_CELL(Cell, Bf16)
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#undef FASTRNN_INSTANTIATE_CELL
#define FASTRNN_INSTANTIATE(scalar_t)                                                  \
  template void input_gradient_cpu(const InputGradient<scalar_t>&, const ThreadPool&); \
  template void weight_gradient_cpu(const WeightGradient<scalar_t>&, const ThreadPool&);
    FASTRNN_INSTANTIATE(float) FASTRNN_INSTANTIATE(double) FASTRNN_INSTANTIATE(Bf16)
#undef FASTRNN_INSTANTIATE
#undef FASTRNN_DISPATCH

}  // namespace fastrnn
