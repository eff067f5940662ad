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
#define FASTRNN_DISPATCH(function)        \
  switch (best_isa()) {                   \
    case Isa::avx512_bf16:                \
    case Isa::avx512:                     \
      return avx512::function(p, pool);   \
    case Isa::avx2:                       \
      return avx2::function(p, pool);     \
    default:                              \
      return portable::function(p, pool); \
  }
#else
#define FASTRNN_DISPATCH(function) return portable::function(p, pool);
#endif

template <template <typename> class Cell, typename scalar_t>
void sequence_forward_cpu(const SequenceForward<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(sequence_forward<Cell>)
}
template <template <typename> class Cell, typename scalar_t>
void sequence_backward_cpu(const SequenceBackward<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(sequence_backward<Cell>)
}
template <template <typename> class Cell>
void sequence_forward_bf16_cpu(const SequenceForward<Bf16>& p, const ThreadPool& pool) {
#if defined(__x86_64__)
  avx512_bf16::sequence_forward<Cell>(p, pool);
#endif
}
template <typename scalar_t>
void input_gradient_cpu(const InputGradient<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(input_gradient)
}
template <typename scalar_t>
void weight_gradient_cpu(const WeightGradient<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(weight_gradient)
}

template void input_gradient_cpu(const InputGradient<float>&, const ThreadPool&);
template void input_gradient_cpu(const InputGradient<double>&, const ThreadPool&);
template void weight_gradient_cpu(const WeightGradient<float>&, const ThreadPool&);
template void weight_gradient_cpu(const WeightGradient<double>&, const ThreadPool&);
#define FASTRNN_INSTANTIATE(name, Cell)                                                           \
  template void sequence_forward_bf16_cpu<Cell>(const SequenceForward<Bf16>&, const ThreadPool&); \
  template void sequence_forward_cpu<Cell>(const SequenceForward<float>&, const ThreadPool&);     \
  template void sequence_forward_cpu<Cell>(const SequenceForward<double>&, const ThreadPool&);    \
  template void sequence_backward_cpu<Cell>(const SequenceBackward<float>&, const ThreadPool&);   \
  template void sequence_backward_cpu<Cell>(const SequenceBackward<double>&, const ThreadPool&);
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#undef FASTRNN_DISPATCH

}  // namespace fastrnn
