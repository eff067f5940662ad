// SPDX-License-Identifier: BSD-3-Clause
// Zoneout (Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2017): of each state
// the share k of its value before the step is kept, next = k prev + (1 - k) next. k is 0 or 1 in training, the rate
// otherwise. h of an LSTM comes from c before that.
#pragma once

#include "math.h"

namespace fastrnn {

template <typename T>
FASTRNN_HD T zoned(T share, T prev, T next) {
  return share * prev + (1.0f - share) * next;  // exact for 0 and 1
}

// What storing a value rounds off, at most: a share of it, and for the smallest ones this much.
struct Rounding {
  double share, least;
};
template <typename Storage>
inline constexpr Rounding kRounding = sizeof(Storage) == 8   ? Rounding{0x1p-51, 0}
                                      : sizeof(Storage) == 4 ? Rounding{0x1p-22, 0}
                                                             : Rounding{0x1.01p-8, 0};  // bfloat16
inline constexpr Rounding kRoundingOfHalf = {0x1.01p-11, 0x1p-25};

// The gradients of zoned(), and what backward of the cell asks for: its states as the cell made them. To be made before
// it: what is zoned passes the rest of the gradient to it. Storage: what the states are rounded to, unless `rounding`
// says otherwise.
template <class Cell, typename T, typename Storage = typename ValueTraits<T>::Scalar>
struct ZoneBackward {
  Values<T, Cell::kStates> kept;  // the way of the gradient past the cell, for d_prev
  Rounding rounding = {kRounding<Storage>.share, kRounding<Storage>.least};

  FASTRNN_HD void before_cell(int k, T share, const Values<T, Cell::kSaved>& saved,
                              const Values<T, Cell::kStates>& prev, Values<T, Cell::kStates>& next,
                              Values<T, Cell::kStates>& d_next) {
    kept[k] = share * d_next[k];
    d_next[k] = (1.0f - share) * d_next[k];
    if constexpr (Cell::kStates == 2) {
      if (k == 1) {
        next[1] = Cell::restore_c(saved, prev);
        return;
      }
    }
    // A share of 1 leaves nothing to restore it from, and no gradient that would ask for it. What rounding leaves of 0
    // is 0 again: relu asks for the sign.
    using Scalar = typename ValueTraits<T>::Scalar;
    const Scalar of_past = static_cast<Scalar>(rounding.share), least = static_cast<Scalar>(rounding.least);
    const T rest = share < 1.0f ? 1.0f - share : broadcast<T>(1.0f);
    const T past = share * prev[k], made = next[k] - past;
    const T noise = (past < 0.0f ? -past : past) * of_past + least;
    const T cleaned = ((made <= noise) & (made >= -noise)) ? T{} : made;
    next[k] = share < 1.0f ? cleaned / rest : next[k];
  }
};

}  // namespace fastrnn
