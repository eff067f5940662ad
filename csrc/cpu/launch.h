// SPDX-License-Identifier: BSD-3-Clause
// The entry points of one instruction set, for every cell and storage type.

namespace fastrnn::FASTRNN_ISA {

template <template <typename> class Cell, typename scalar_t>
void sequence_forward(const SequenceForward<scalar_t>& p, const ThreadPool& pool) {
  Forward<Cell, scalar_t>(p, pool).run();
}
template <template <typename> class Cell, typename scalar_t>
void sequence_backward(const SequenceBackward<scalar_t>& p, const ThreadPool& pool) {
  Backward<Cell, scalar_t>(p, pool).run();
}

#define FASTRNN_INSTANTIATE(name, Cell)                                                     \
  template void sequence_forward<Cell>(const SequenceForward<float>&, const ThreadPool&);   \
  template void sequence_forward<Cell>(const SequenceForward<double>&, const ThreadPool&);  \
  template void sequence_backward<Cell>(const SequenceBackward<float>&, const ThreadPool&); \
  template void sequence_backward<Cell>(const SequenceBackward<double>&, const ThreadPool&);
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
