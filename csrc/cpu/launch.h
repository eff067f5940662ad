// SPDX-License-Identifier: BSD-3-Clause
// The entry points of one instruction set, for every cell and storage type.

namespace fastrnn::FASTRNN_ISA {

template <template <typename> class Cell, typename scalar_t>
void sequence_forward(const SequenceForward<scalar_t>* layers, int count, const ThreadPool& pool) {
  run_passes<Forward<Cell, scalar_t>>(layers, count, pool);
}
template <template <typename> class Cell, typename scalar_t>
int64_t pack_weights(const SequenceForward<scalar_t>& p, void* block) {
  const Weights<Cell, scalar_t> weights(p);
  if (block) weights.pack_to(static_cast<WordOf<scalar_t>*>(block));
  return weights.words() * static_cast<int64_t>(sizeof(WordOf<scalar_t>));
}
template <template <typename> class Cell, typename scalar_t>
void sequence_backward(const SequenceBackward<scalar_t>* layers, int count, const ThreadPool& pool) {
  run_passes<Backward<Cell, scalar_t>>(layers, count, pool);
}
template <typename scalar_t>
void weight_gradient(const WeightGradient<scalar_t>& p, const ThreadPool& pool) {
  WeightGradients<scalar_t>(p, pool).run();
}

#define FASTRNN_INSTANTIATE_TYPE(scalar_t)                                         \
  template void input_gradient(const InputGradient<scalar_t>&, const ThreadPool&); \
  template void weight_gradient(const WeightGradient<scalar_t>&, const ThreadPool&);
#define FASTRNN_INSTANTIATE_CELL(Cell, scalar_t)                                                  \
  template void sequence_forward<Cell>(const SequenceForward<scalar_t>*, int, const ThreadPool&); \
  template int64_t pack_weights<Cell>(const SequenceForward<scalar_t>&, void*);                   \
  template void sequence_backward<Cell>(const SequenceBackward<scalar_t>*, int, const ThreadPool&);
#if defined(FASTRNN_BF16)
FASTRNN_INSTANTIATE_TYPE(Bf16)
#define FASTRNN_INSTANTIATE(name, Cell) FASTRNN_INSTANTIATE_CELL(Cell, Bf16)
FASTRNN_FOR_EACH_ONE_PRODUCT_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#else
FASTRNN_INSTANTIATE_TYPE(float)
FASTRNN_INSTANTIATE_TYPE(double)
#define FASTRNN_INSTANTIATE(name, Cell) \
  FASTRNN_INSTANTIATE_CELL(Cell, float) \
  FASTRNN_INSTANTIATE_CELL(Cell, double)
FASTRNN_FOR_EACH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#endif
#if defined(FASTRNN_WIDEN)
FASTRNN_INSTANTIATE_TYPE(Half)
FASTRNN_INSTANTIATE_TYPE(WidenedBf16)
#define FASTRNN_INSTANTIATE(name, Cell) \
  FASTRNN_INSTANTIATE_CELL(Cell, Half)  \
  FASTRNN_INSTANTIATE_CELL(Cell, WidenedBf16)
FASTRNN_FOR_EACH_TORCH_CELL(FASTRNN_INSTANTIATE)
#undef FASTRNN_INSTANTIATE
#endif
#undef FASTRNN_INSTANTIATE_CELL
#undef FASTRNN_INSTANTIATE_TYPE

}  // namespace fastrnn::FASTRNN_ISA
