// SPDX-License-Identifier: BSD-3-Clause
// Hands a launch to the kernels of the instruction set in use.
#include <cstdlib>
#include <type_traits>

#include "../kernels.h"
#include "isa.h"

namespace fastrnn {

#define FASTRNN_DECLARE(isa)                                                         \
  namespace isa {                                                                    \
  template <template <typename> class Cell, typename scalar_t>                       \
  void sequence_forward(const SequenceForward<scalar_t>*, int, const ThreadPool&);   \
  template <template <typename> class Cell, typename scalar_t>                       \
  int64_t pack_weights(const SequenceForward<scalar_t>&, void*);                     \
  template <template <typename> class Cell, typename scalar_t>                       \
  void sequence_backward(const SequenceBackward<scalar_t>*, int, const ThreadPool&); \
  template <typename scalar_t>                                                       \
  void input_gradient(const InputGradient<scalar_t>&, const ThreadPool&);            \
  template <typename scalar_t>                                                       \
  void weight_gradient(const WeightGradient<scalar_t>&, const ThreadPool&);          \
  }
FASTRNN_DECLARE(portable)
FASTRNN_DECLARE(avx2)
FASTRNN_DECLARE(avx512)
FASTRNN_DECLARE(avx512_bf16)
#undef FASTRNN_DECLARE

template <typename scalar_t>
inline constexpr bool kIsWide = std::is_floating_point_v<scalar_t>;  // not 16-bit storage

#if defined(__x86_64__)
#define FASTRNN_DISPATCH(call)                                            \
  if constexpr (std::is_same_v<scalar_t, Bf16>) {                         \
    return avx512_bf16::call;                                             \
  } else {                                                                \
    if (best_isa() >= Isa::avx512) return avx512::call;                   \
    if (!kIsWide<scalar_t> || best_isa() == Isa::avx2) return avx2::call; \
    if constexpr (kIsWide<scalar_t>) return portable::call;               \
  }
#else  // 16-bit storage is converted before it comes here: takes_bf16() and takes_half() say so
#define FASTRNN_DISPATCH(call)       \
  if constexpr (kIsWide<scalar_t>) { \
    return portable::call;           \
  } else {                           \
    std::abort();                    \
  }
#endif

template <template <typename> class Cell, typename scalar_t>
void sequence_forward_cpu(const SequenceForward<scalar_t>* layers, int count, const ThreadPool& pool) {
  FASTRNN_DISPATCH(sequence_forward<Cell>(layers, count, pool))
}
template <template <typename> class Cell, typename scalar_t>
int64_t pack_weights_cpu(const SequenceForward<scalar_t>& p, void* block) {
  FASTRNN_DISPATCH(pack_weights<Cell>(p, block))
}
template <template <typename> class Cell, typename scalar_t>
void sequence_backward_cpu(const SequenceBackward<scalar_t>* layers, int count, const ThreadPool& pool) {
  FASTRNN_DISPATCH(sequence_backward<Cell>(layers, count, pool))
}
template <typename scalar_t>
void input_gradient_cpu(const InputGradient<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(input_gradient(p, pool))
}
template <typename scalar_t>
void weight_gradient_cpu(const WeightGradient<scalar_t>& p, const ThreadPool& pool) {
  FASTRNN_DISPATCH(weight_gradient(p, pool))
}

#define FASTRNN_INSTANTIATE_CELL(Cell, scalar_t)                                                      \
  template void sequence_forward_cpu<Cell>(const SequenceForward<scalar_t>*, int, const ThreadPool&); \
  template int64_t pack_weights_cpu<Cell>(const SequenceForward<scalar_t>&, void*);                   \
  template void sequence_backward_cpu<Cell>(const SequenceBackward<scalar_t>*, int, const ThreadPool&);
#define FASTRNN_INSTANTIATE(name, Cell) \
  FASTRNN_INSTANTIATE_CELL(Cell, float) \
  FASTRNN_INSTANTIATE_CELL(Cell, double)
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#define FASTRNN_INSTANTIATE(name, Cell) FASTRNN_INSTANTIATE_CELL(Cell, Bf16)
FASTRNN_FOR_EACH_ONE_PRODUCT_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#define FASTRNN_INSTANTIATE(name, Cell) \
  FASTRNN_INSTANTIATE_CELL(Cell, Half)  \
  FASTRNN_INSTANTIATE_CELL(Cell, WidenedBf16)
FASTRNN_FOR_EACH_TORCH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#undef FASTRNN_INSTANTIATE_CELL
#define FASTRNN_INSTANTIATE(scalar_t)                                                  \
  template void input_gradient_cpu(const InputGradient<scalar_t>&, const ThreadPool&); \
  template void weight_gradient_cpu(const WeightGradient<scalar_t>&, const ThreadPool&);
FASTRNN_INSTANTIATE(float)
FASTRNN_INSTANTIATE(double)
FASTRNN_INSTANTIATE(Bf16)
FASTRNN_INSTANTIATE(Half)
FASTRNN_INSTANTIATE(WidenedBf16)
#undef FASTRNN_INSTANTIATE
#undef FASTRNN_DISPATCH

}  // namespace fastrnn
