// SPDX-License-Identifier: BSD-3-Clause
// The weights that a forward pass multiplies rows with: packed before the calls of a layer, in the call, or read where
// they are. Compiled once for each instruction set, after tile.h.

namespace fastrnn::FASTRNN_ISA {

// A weight [G*units, K] and its bias [G*units] or null, which rows are multiplied with: packed or where it is.
template <typename S, int kGates>
class Weight {
 public:
  using Shape = PanelShape<Sum<S>, kGates>;
  using Word = WordOf<S>;

  Weight(const S* w, const Sum<S>* bias, int64_t units, int64_t K) : w_(w), bias_(bias), units_(units), K_(K) {}

  // Of the packed weight, all its panels; none where there is no weight.
  int64_t words() const { return w_ ? panels() * panel_words() : 0; }
  // Reads panels that pack_to() packed.
  void take(const Word* packed) {
    packed_ = w_ ? packed : nullptr;
    pack_bias();
  }
  // Room for panels that pack() packs: for all of them, or for some that take turns.
  void make_room(int64_t places) {
    room_ = Buffer<Word>(places * panel_words());
    packed_ = room_.get();
    pack_bias();
  }
  // Packs the panels of these units, the first of them at `place`, where there is room.
  void pack(Units units, int64_t place) const {
    if (room_.get()) pack_gates<S, kGates>(w_, units_, K_, units, room_.get() + place * panel_words());
  }
  void pack_to(Word* packed) const {
    if (w_) pack_gates<S, kGates>(w_, units_, K_, {0, units_}, packed);
  }

  // out [count, G*kBlock] = bias + rows * some units of a panel, which lies at `place` if it is packed.
  void times(Units units, int64_t place, int count, const Operand<S>* const* rows, Sum<S>* out) const {
    if (packed_) {
      const int64_t panel = units.begin / Shape::kBlock, column = units.begin % Shape::kBlock;
      const Sum<S>* bias = packed_bias_.get() ? packed_bias_.get() + panel * Shape::kColumns + column : nullptr;
      product_of_units<Operand<S>, Shape>(units.end - units.begin, count, K_, rows,
                                          packed_ + place * panel_words() + column, Shape::kColumns, bias, out);
    } else {
      product_unpacked<S, kGates>(count, K_, rows, w_, bias_, units_, units, out);
    }
  }

 private:
  int64_t panels() const { return Shape::panels(units_); }
  int64_t panel_words() const { return words_of<S>(K_) * Shape::kColumns; }
  void pack_bias() {
    if (!bias_) return;
    packed_bias_ = Buffer<Sum<S>>(panels() * Shape::kColumns);
    pack_gates<Sum<S>, kGates>(bias_, units_, 1, {0, units_}, packed_bias_.get());
  }

  const S* w_ = nullptr;
  const Sum<S>* bias_ = nullptr;
  int64_t units_ = 0, K_ = 0;
  Buffer<Word> room_;             // [places, words of K, G*kBlock]
  const Word* packed_ = nullptr;  // so too, or [panels, ..]; null where the weight is read where it is
  Buffer<Sum<S>> packed_bias_;    // [panels, G*kBlock]
};

// The weights of a layer. Packed before its calls they lie in one block, in the order of their names here.
template <template <typename> class CellOf, typename S>
struct Weights {
  using Word = WordOf<S>;
  Weight<S, CellOf<Vec<Sum<S>>>::kGates> ih, hh;
  Weight<S, 1> hr;

  explicit Weights(const SequenceForward<S>& p)
      : ih(p.w_ih, p.b_ih, p.H, p.I), hh(p.w_hh, p.b_hh, p.H, p.P), hr(p.w_hr, nullptr, p.P, p.H) {}

  int64_t words() const { return ih.words() + hh.words() + hr.words(); }
  void pack_to(Word* block) const {
    ih.pack_to(block);
    hh.pack_to(block + ih.words());
    hr.pack_to(block + ih.words() + hh.words());
  }
  // Reads the block where the plan would have it packed.
  void take(const Word* block, const CpuPlan& plan) {
    if (plan.pack_input) ih.take(block);
    if (!plan.pack_recurrent) return;
    hh.take(block + ih.words());
    hr.take(block + ih.words() + hh.words());
  }
};

}  // namespace fastrnn::FASTRNN_ISA
