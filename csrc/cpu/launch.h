// SPDX-License-Identifier: BSD-3-Clause
// The entry points of one instruction set, for every cell and storage type.

namespace fastrnn::FASTRNN_ISA {

template <template <typename> class Cell, typename scalar_t>
void sequence_forward(const SequenceForward<scalar_t>& p, const ThreadPool& pool) {
  Forward<Cell, scalar_t>(p, pool).run();
}
#if defined(FASTRNN_BF16)
#define FASTRNN_INSTANTIATE(name, Cell) \
  template void sequence_forward<Cell>(const SequenceForward<Bf16>&, const ThreadPool&);
#else
template <template <typename> class Cell, typename scalar_t>
void sequence_backward(const SequenceBackward<scalar_t>& p, const ThreadPool& pool) {
  Backward<Cell, scalar_t>(p, pool).run();
}
template <typename scalar_t>
void weight_gradient(const WeightGradient<scalar_t>& p, const ThreadPool& pool) {
  WeightGradients<scalar_t>(p, pool).run();
}

template void input_gradient(const InputGradient<float>&, const ThreadPool&);
template void input_gradient(const InputGradient<double>&, const ThreadPool&);
template void weight_gradient(const WeightGradient<float>&, const ThreadPool&);
template void weight_gradient(const WeightGradient<double>&, const ThreadPool&);
#define FASTRNN_INSTANTIATE(name, Cell)                                                     \
  template void sequence_forward<Cell>(const SequenceForward<float>&, const ThreadPool&);   \
  template void sequence_forward<Cell>(const SequenceForward<double>&, const ThreadPool&);  \
  template void sequence_backward<Cell>(const SequenceBackward<float>&, const ThreadPool&); \
  template void sequence_backward<Cell>(const SequenceBackward<double>&, const ThreadPool&);
#endif
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
