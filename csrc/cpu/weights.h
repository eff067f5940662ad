// SPDX-License-Identifier: BSD-3-Clause
// The weights that rows are multiplied with, W x or, backwards, x W: packed before the calls of a layer, in the call,
// or read where they are. Compiled once for each instruction set, after tile.h.

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
    places_ = panels();
    pack_bias();
  }
  // Room for panels that pack() packs: for all of them, or for some that take turns.
  void make_room(int64_t places) {
    room_ = Buffer<Word>(places * panel_words());
    packed_ = room_.get();
    places_ = places;
    pack_bias();
  }
  // Packs the panels of these units, the first of them at `place`, where there is room.
  void pack(Units units, int64_t place) const {
    if (room_.get()) pack_gates<S, kGates>(w_, units_, K_, units, room_.get() + place * panel_words());
  }
  void pack_to(Word* packed) const {
    if (w_) pack_gates<S, kGates>(w_, units_, K_, {0, units_}, packed);
  }

  // The packed panel at a place, if there is one.
  Ahead ahead(int64_t place) const {
    if (!packed_ || place < 0 || place >= places_) return {};
    return {packed_ + place * panel_words(), panel_words(), places_ * panel_words()};
  }

  // out [count, G*kBlock] = bias + rows * some units of a panel, which lies at `place` if it is packed.
  void times(Units units, int64_t place, int count, const Operand<S>* const* rows, Sum<S>* out, Ahead& ahead) const {
    if (packed_) {
      const int64_t panel = units.begin / Shape::kBlock, column = units.begin % Shape::kBlock;
      const Sum<S>* bias = packed_bias_.get() ? packed_bias_.get() + panel * Shape::kColumns + column : nullptr;
      product_of_units<Operand<S>, Shape>(units.end - units.begin, count, K_, rows,
                                          packed_ + place * panel_words() + column, Shape::kColumns, bias, out, ahead);
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
  int64_t places_ = 0;            // for panels
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

// A matrix w [K, columns] to multiply rows with from the left. All its panels are packed; or, where few rows come, only
// a last one that is not full, the others being read where they are.
template <typename S>
class Columns {
 public:
  using Panel = PanelShape<Sum<S>, 1>;

  Columns() = default;
  Columns(const S* w, int64_t columns, int64_t K, bool pack, const ThreadPool& pool) : w_(w), columns_(columns), K_(K) {
    first_packed_ = pack ? 0 : columns / Panel::kBlock;
    const int64_t first_column = first_packed_ * Panel::kBlock, to_pack = columns - first_column;
    packed_ = Buffer<WordOf<S>>(Panel::panels(to_pack) * words_of<S>(K) * Panel::kColumns);
    constexpr int64_t kRowBlock = 64;  // whole words
    const ThreadPool& packers = pack ? pool : kOneThread;
    const ProductShares shares(K, kRowBlock, to_pack, Panel::kBlock, packers.threads);
    in_parallel(packers, shares.count(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const ProductShares::Share share = shares[i];
        const int64_t k0 = share.row_begin;
        for_each_panel<Panel>({first_column + share.column_begin, first_column + share.column_end}, [&](Units units) {
          const auto row = [&](int64_t k) { return w + (k0 + k) * columns + units.begin; };
          pack_columns<S>(share.row_end - k0, units.end - units.begin, row,
                          packed(units) + words_of<S>(k0) * Panel::kColumns);
        });
      }
    });
  }

  // For the rows [begin, end) of a matrix `from` [.., K], in tiles: calls before(first, count), and after the product
  // f(first, count, out), out [count, kBlock] = the tile * the columns of these units. ascending: as for_each_panel.
  template <typename Before, typename F>
  void times(Units units, const Operand<S>* from, int64_t begin, int64_t end, Before before, F f,
             bool ascending = true) const {
    constexpr int kRows = kTileRows<Panel::kVectors>, kTiles = 16;
    alignas(64) Sum<S> sums[kTiles * kRows * Panel::kColumns];
    for_each_tile(begin, end, kTiles * kRows, [&](int64_t b, int some) {
      const int64_t last = b + some;
      // Tiles share a part of the panel, as long as it stays in L2 with their rows; their sums wait for the next one.
      const int64_t parts = some > kRows ? (words_of<S>(K_) + kWordsOfPart - 1) / kWordsOfPart : 1;
      const int64_t depth = (words_of<S>(K_) + parts - 1) / parts * Multiply<S>::kDepth;
      for (int64_t k = 0; k < K_; k += depth) {
        const bool is_last = k + depth >= K_;
        Ahead ahead = is_last ? part_of(units, ascending ? 1 : -1, 0, depth) : part_of(units, 0, k + depth, depth);
        for_each_tile(b, last, kRows, [&](int64_t first, int count) {
          Sum<S>* const out = parts == 1 ? sums : sums + (first - b) * Panel::kColumns;
          if (is_last) before(first, count);
          times(units, from + first * K_, count, k, std::min(K_, k + depth), out, ahead);
          if (is_last) f(first, count, out);
        });
      }
    });
  }

 private:
  static constexpr int64_t kWordsOfPart = 1024;

  // Adds what the columns [k, end) of the rows give, from k = 0 on.
  void times(Units units, const Operand<S>* from, int count, int64_t k, int64_t end, Sum<S>* out, Ahead& ahead) const {
    using R = Operand<S>;
    const R* rows[kMaxTileRows];
    for (int r = 0; r < count; ++r) rows[r] = from + r * K_ + k;
    const Sum<S>* const start = k > 0 ? out : nullptr;
    const int64_t width = units.end - units.begin;
    if (units.begin >= first_packed_ * Panel::kBlock) {
      const WordOf<S>* const part = packed(units) + words_of<S>(k) * Panel::kColumns;
      product_of_units<R, Panel>(width, count, end - k, rows, part, Panel::kColumns, start, out, ahead);
    } else {
      product_of_units<R, Panel>(width, count, end - k, rows, w_ + k * columns_ + units.begin, columns_, start, out,
                                 ahead);
    }
  }

  // If it is packed: the part from row k on of the panel of these units, or of one so many panels further.
  Ahead part_of(Units units, int64_t further, int64_t k, int64_t depth) const {
    const int64_t panel = units.begin / Panel::kBlock - first_packed_ + further;
    const int64_t panels = Panel::panels(columns_) - first_packed_, words = words_of<S>(K_);
    if (panel < 0 || panel >= panels) return {};
    const int64_t part = std::min(words_of<S>(depth), words - words_of<S>(k));
    return {packed_.get() + (panel * words + words_of<S>(k)) * Panel::kColumns, part * Panel::kColumns,
            panels * words * Panel::kColumns};
  }

  WordOf<S>* packed(Units units) const {  // from their first on
    const int64_t panel = units.begin / Panel::kBlock - first_packed_;
    return packed_.get() + panel * words_of<S>(K_) * Panel::kColumns + units.begin % Panel::kBlock;
  }

  const S* w_ = nullptr;
  int64_t columns_ = 0, K_ = 0, first_packed_ = 0;
  Buffer<WordOf<S>> packed_;  // [panels from first_packed on, words of K, kBlock]
};

}  // namespace fastrnn::FASTRNN_ISA
