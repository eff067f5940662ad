// SPDX-License-Identifier: BSD-3-Clause
// THE SEAM between ops.cpp, which knows torch, and the kernels, which do not: parameters and launchers.
//
// Sizes: T time, B batch, I input, H hidden, P projection (the width of h; P == H without one), G gates of the cell,
// N rows of the sequence: T*B, or the sum of the lengths when they differ. Strides count elements. scalar_t is the
// storage type, acc_t the type that gates and states are computed in: double for double, float for float, half and
// bfloat16. Tensors are row-major and contiguous unless a stride is named. Outputs alias nothing unless said.
#pragma once

#include <cstdint>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/norm.h"
#include "cells/rnn.h"
#include "cells/slstm.h"
#include "cells/zoneout.h"

// The lists of cells: they expand X(op name, cell template). Tests walk them. Those of torch.nn have persistent CUDA
// kernels too, and CPU kernels that widen 16-bit storage; those that normalise have CUDA kernels of their own, and so
// has the one with two products, which alone has no CPU kernel that multiplies bfloat16.
#define FASTRNN_FOR_EACH_TORCH_CELL(X) \
  X(rnn_tanh, RnnTanhCell)             \
  X(rnn_relu, RnnReluCell)             \
  X(lstm, LstmCell)                    \
  X(gru, GruCell)
#define FASTRNN_FOR_EACH_UNIT_CELL(X) \
  FASTRNN_FOR_EACH_TORCH_CELL(X)      \
  X(rnn_leaky_relu, RnnLeakyReluCell) \
  X(lstm_coupled, CoupledLstmCell)    \
  X(lstm_peephole, PeepholeLstmCell)  \
  X(slstm, SlstmCell)
#define FASTRNN_FOR_EACH_NORM_CELL(X) \
  X(lstm_norm, NormLstmCell)          \
  X(gru_norm, NormGruCell)
#define FASTRNN_FOR_EACH_ONE_PRODUCT_CELL(X) \
  FASTRNN_FOR_EACH_UNIT_CELL(X)              \
  FASTRNN_FOR_EACH_NORM_CELL(X)
#define FASTRNN_FOR_EACH_CELL(X)       \
  FASTRNN_FOR_EACH_ONE_PRODUCT_CELL(X) \
  X(gru_before, GruBeforeCell)

namespace fastrnn {

// Whether a cell is one of torch.nn's.
template <template <typename> class Cell>
inline constexpr bool kIsTorchCell = false;
#define FASTRNN_IS_TORCH_CELL(name, Cell) \
  template <>                             \
  inline constexpr bool kIsTorchCell<Cell> = true;
FASTRNN_FOR_EACH_TORCH_CELL(FASTRNN_IS_TORCH_CELL)
#undef FASTRNN_IS_TORCH_CELL

// ---------------------------------------------------------------------------------------------------------------------
// CPU: one launch runs one layer in one direction over the whole sequence. scalar_t is float or double; or one of the
// 16-bit types below, for the cells that the lists above name, where the instruction set has them (cpu/isa.h).

// Where step t lives. Dense: count(t) == B for every t. Packed: rows of longer sequences first, counts non-increasing.
// With lengths: input and output are dense, what lies between them is packed, and the batch runs in the order of the
// lengths. "Position" b is the place of a sequence in that order, its row of the batch elsewhere.
struct Steps {
  int64_t T;
  const int64_t* row_begin;        // [T + 1] first row of each step; row_begin[T] == N
  bool reverse;                    // run from t = T-1 down to 0
  const int64_t* order = nullptr;  // [B] with lengths: the row of the batch at each position, longest first
  int64_t B = 0;                   // with lengths: the rows of the batch

  int64_t time(int64_t s) const { return reverse ? T - 1 - s : s; }  // the s-th step to be run
  int64_t count(int64_t s) const {                                   // its rows; 0 before the first and after the last
    if (s < 0 || s >= T) return 0;
    const int64_t t = time(s);
    return row_begin[t + 1] - row_begin[t];
  }
  // Of position b at the s-th step: its row of what is packed, its row of input and output, its row of the states.
  int64_t row(int64_t s, int64_t b) const { return row_begin[time(s)] + b; }
  int64_t place(int64_t s, int64_t b) const { return order ? time(s) * B + order[b] : row(s, b); }
  int64_t state(int64_t b) const { return order ? order[b] : b; }
};

// Where the rows of the input lie, in elements. Any strides, so that it is read as it came.
struct InputRows {
  bool packed;       // the rows of a step follow those of the step before
  int64_t stride;    // between the rows of a step
  int64_t stride_t;  // between steps, unless packed

  int64_t offset(const Steps& steps, int64_t s, int64_t b) const {
    const int64_t t = steps.time(s);
    return (packed ? steps.row_begin[t] * stride : t * stride_t) + steps.state(b) * stride;
  }
};

// What happens to the states between two steps, beside the cell; null or 0: nothing. R: the rows of input and output.
inline constexpr int kZonedStates = 2;  // h and c
template <typename scalar_t>
struct Controls {
  const uint8_t* reset = nullptr;             // [R]  1: the states are zero before the step
  const scalar_t* h_mask = nullptr;           // [B, P]  multiplies h in the recurrent product
  const scalar_t* zone[kZonedStates] = {};    // [R, H]  share of the state before that is kept: zoneout
  bool zone_is_one_value[kZonedStates] = {};  // [1] in place of [R, H]
  double grad_clip = 0;  // the gradient that leaves a step for the one before is clamped to +-grad_clip
  Rounding rounding = {kRounding<scalar_t>.share, kRounding<scalar_t>.least};  // of the states that backward reads
};

// h before the s-th step of position b: a row of h0 or of the output, or null where the states are reset.
template <typename scalar_t>
const scalar_t* h_before(const Steps& steps, const uint8_t* reset, const scalar_t* h0, const scalar_t* output,
                         int64_t P, int64_t s, int64_t b) {
  if (reset && reset[steps.place(s, b)]) return nullptr;
  return b >= steps.count(s - 1) ? h0 + steps.state(b) * P : output + steps.place(s - 1, b) * P;
}

// Storage of 16 bits: float16, and bfloat16, the upper half of a float. Kernels multiply pairs of Bf16 as they are;
// Half and WidenedBf16 they widen to float as they read them.
struct Half {
  uint16_t bits;
};
template <>
inline constexpr Rounding kRounding<Half> = kRoundingOfHalf;
struct Bf16 {
  uint16_t bits;
};
struct WidenedBf16 {
  uint16_t bits;
};
// acc_t, and operand_t: what the rows that are multiplied with a weight are made of.
template <typename scalar_t>
struct TypesOf {
  using acc_t = scalar_t;
  using operand_t = scalar_t;
};
template <>
struct TypesOf<Bf16> {
  using acc_t = float;
  using operand_t = Bf16;
};
template <>
struct TypesOf<Half> : TypesOf<float> {};
template <>
struct TypesOf<WidenedBf16> : TypesOf<float> {};

// How to run body(begin, end) over disjoint ranges that cover 0..count, on the framework's threads.
struct ThreadPool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t count, Body body, void* context);
  int threads;
};

template <typename scalar_t>
struct SequenceForward {
  using acc_t = typename TypesOf<scalar_t>::acc_t;
  int64_t B, I, H, P;
  int64_t N;  // rows of what is packed
  Steps steps;
  // inputs
  const scalar_t* input;  // [R, I], or x_gates [R, G*H] when w_ih is null
  InputRows input_rows;
  const scalar_t* w_ih;  // [G*H, I] or null
  const scalar_t* w_hh;  // [G*H, P]
  const acc_t* b_ih;     // [G*H] or null
  const acc_t* b_hh;     // [G*H] or null
  const scalar_t* w_hr;  // [P, H] or null: no projection, P == H. Of a cell that resets before: what r h meets
  const void* packed;    // the three weights as pack_weights_cpu packs them, or null
  const acc_t* w_cell;   // [kParameters*H] or null
  const scalar_t* h0;    // [B, P]
  const acc_t* c0;       // [C, B, H]  the C = kStates - 1 states beside h; null for cells without
  Controls<scalar_t> controls;
  // outputs
  scalar_t* output;       // [R, P]
  scalar_t* h_n;          // [B, P]
  acc_t* c_n;             // [C, B, H]; null for cells without c. Holds the running state
  scalar_t* cells;        // [R, H]  c after each step, or null
  scalar_t* saved_gates;  // [N, kSaved*H]; null in inference
  acc_t* saved_c;         // [C, N, H]  c after each step; null in inference and for cells without c
  scalar_t* saved_m;      // [N, H]  h before the projection; null in inference and without a projection
  scalar_t* h_in;         // [N, P]  what the recurrent product reads: h before the step, masked; null without h_mask
};

template <typename scalar_t>
struct SequenceBackward {
  using acc_t = typename TypesOf<scalar_t>::acc_t;
  using operand_t = typename TypesOf<scalar_t>::operand_t;
  int64_t B, H, P;
  int64_t N;  // rows of what is packed
  Steps steps;
  // inputs
  const scalar_t* w_hh;  // [G*H, P]
  const scalar_t* w_hr;  // [P, H] or null
  const acc_t* w_cell;   // [kParameters*H] or null
  const scalar_t* h0;    // [B, P]
  const acc_t* c0;       // [C, B, H]; null for cells without c
  Controls<scalar_t> controls;
  const scalar_t* output;       // [R, P]
  const scalar_t* saved_gates;  // [N, kSaved*H]
  const acc_t* saved_c;         // [C, N, H]; null for cells without c
  const scalar_t* d_output;     // [R, P] or null: zero
  const acc_t* d_h_n;           // [B, P] or null: zero
  const acc_t* d_c_n;           // [C, B, H] or null: zero
  const scalar_t* d_cells;      // [R, H] or null: zero
  bool need_states;             // whether d_h0 and d_c0 are wanted; else they are left unfinished
  // outputs
  operand_t* d_x_gates;    // [N, G*H]; of a cell that resets before [N, 3*H]
  operand_t* d_h_gates;    // [N, G*H]; aliases d_x_gates unless Cell::kGateGradsDiffer
  operand_t* d_projected;  // [N, P]  gradient of what the product with w_hr gave; null without one
  acc_t* d_h0;             // [B, P]  carries the direct part of d_h from step to step
  acc_t* d_c0;             // [C, B, H]  carries d_c; null for cells without c
  acc_t* d_w_cell;         // [kParameters*H]  of a cell that normalises, else null
};

// d_input = d_x_gates W_ih.
template <typename scalar_t>
struct InputGradient {
  using operand_t = typename TypesOf<scalar_t>::operand_t;
  int64_t N, M, I;           // M = G*H
  const operand_t* d_gates;  // [N, M]
  const scalar_t* w_ih;      // [M, I]
  scalar_t* const* d_input;  // [N] rows of I
};

// d_weight = the sum over n of d_gates[n]^T rows[n], and d_bias that of d_gates[n]: of one weight or of two.
template <typename scalar_t>
struct WeightGradient {
  using operand_t = typename TypesOf<scalar_t>::operand_t;
  struct Weight {
    int64_t K = 0;
    const scalar_t* const* rows = nullptr;  // [N] rows of K: what the weight was multiplied with
    scalar_t* d_weight = nullptr;           // [M, K] or null
    scalar_t* d_bias = nullptr;             // [M] or null
  };
  int64_t N, M;
  const operand_t* d_gates;  // [N, M]
  Weight first, second;
};

template <typename scalar_t>
void input_gradient_cpu(const InputGradient<scalar_t>&, const ThreadPool&);
template <typename scalar_t>
void weight_gradient_cpu(const WeightGradient<scalar_t>&, const ThreadPool&);
// One layer, or two of the same sizes that do not wait for each other.
template <template <typename> class Cell, typename scalar_t>
void sequence_forward_cpu(const SequenceForward<scalar_t>* layers, int count, const ThreadPool&);
// Packs w_ih, w_hh and w_hr of [G*H, I], [G*H, P] and [P, H], those that are there, into `block`, if it is not null.
// Returns the bytes that they take. Their form belongs to the processor: it is not to be stored.
template <template <typename> class Cell, typename scalar_t>
int64_t pack_weights_cpu(const SequenceForward<scalar_t>&, void* block);
template <template <typename> class Cell, typename scalar_t>
void sequence_backward_cpu(const SequenceBackward<scalar_t>* layers, int count, const ThreadPool&);

// ---------------------------------------------------------------------------------------------------------------------
// CUDA, path "gates": one step of one layer; the recurrent product has been made by the caller.

// What happens to the states at one step, beside the cell; null: nothing.
template <typename scalar_t>
struct StepControls {
  const int64_t* lengths = nullptr;  // [B]  a row of length t or less is dead: its states stay, its output is zero
  int64_t t = 0;
  const uint8_t* reset = nullptr;             // [B]  1: the states are zero before the step
  const scalar_t* zone[kZonedStates] = {};    // [B, H]  share of the state before that is kept
  bool zone_is_one_value[kZonedStates] = {};  // [1] in place of [B, H]
};

// The step's rows are the first B rows of each pointer. C: the states beside h.
template <typename scalar_t, typename acc_t>
struct GatesForward {
  int64_t B, H;
  // inputs
  const scalar_t* x_gates;  // [B, G*H]  W_ih x + b_ih
  const scalar_t* h_gates;  // [B, G*H]  W_hh h_prev, without bias
  const scalar_t* b_hh;     // [G*H] or null
  const scalar_t* w_cell;   // [kParameters*H] or null
  const scalar_t* h_prev;   // [B, H]; null with a projection: the LSTM reads h through the product alone
  StepControls<scalar_t> controls;
  // state, updated in place
  acc_t* c;          // [C, B, H]; null for cells without c
  int64_t c_stride;  // between the C
  // outputs
  scalar_t* h_next;        // [B, H]
  scalar_t* h_state;       // [B, H]  may be h_prev: h_next for the rows that live, or null
  scalar_t* cells;         // [B, H]  c after the step, or null
  scalar_t* saved_gates;   // [B, kSaved*H]; null in inference
  acc_t* saved_c;          // [C, B, H]  c after the step; null in inference and for cells without c
  int64_t saved_c_stride;  // between the C
  acc_t* scratch;          // [B, kScratch*H]  of a cell that normalises, else null
};

template <typename scalar_t, typename acc_t>
struct GatesBackward {
  int64_t B, H;
  // inputs
  const scalar_t* w_cell;       // [kParameters*H] or null
  const scalar_t* saved_gates;  // [B, kSaved*H]
  const scalar_t* h_prev;       // [B, H]; null with a projection
  const scalar_t* h_next;       // [B, H]; null with a projection
  const acc_t* c_prev;          // [C, B, H]; null for cells without c
  int64_t c_prev_stride;        // between the C
  const acc_t* c_next;          // [C, B, H]; null for cells without c
  int64_t c_next_stride;        // between the C
  const scalar_t* d_output;     // [B, H]  gradient of this step's output, or null: zero
  const scalar_t* d_h_product;  // [B, H]  d_h_gates of the following step times W_hh, or null: zero
  const scalar_t* d_cells;      // [B, H]  gradient of this step's c, or null: zero
  StepControls<scalar_t> controls;
  double grad_clip;  // of the gradient that leaves the step for c before it; 0: none
  // carried from step to step, updated in place
  acc_t* d_h;          // [B, H]  in: gradient of h_next beside d_output and d_h_product; out: d_prev of h
  acc_t* d_c;          // [C, B, H]  in: gradient of c_next; out: gradient of c_prev; null for cells without c
  int64_t d_c_stride;  // between the C
  // outputs
  scalar_t* d_x_gates;  // [B, G*H]
  scalar_t* d_h_gates;  // [B, G*H]; aliases d_x_gates unless Cell::kGateGradsDiffer
  acc_t* d_w_rows;      // [B, kParameters*H]  each row's part of the gradient of w_cell; null for cells without. A cell
                        // that normalises adds its own
  acc_t* scratch;       // [B, kScratch*H]  of a cell that normalises, else null
};

// What the controls do to h between two steps. Rows of width values; mask [rows, width] or null; lengths, t and reset
// as in StepControls.

// to = from, masked; zero where the row is reset.
template <typename scalar_t>
struct ProductInput {
  const scalar_t *from, *mask;
  const uint8_t* reset;
  scalar_t* to;
};
// The projected h of the rows that live becomes their state.
template <typename scalar_t>
struct KeepLiving {
  const scalar_t* from;
  const int64_t* lengths;
  int64_t t;
  scalar_t* state;
};
// The gradient that leaves a step for h before it, through the product and beside it: d_h = clipped(product mask +
// d_h), zero where the row is reset, as it was where it is dead.
template <typename scalar_t, typename acc_t>
struct ThroughStep {
  const scalar_t *product, *mask;
  const int64_t* lengths;
  int64_t t;
  const uint8_t* reset;
  double grad_clip;
  acc_t* d_h;
};
// The gradient of the projected h of the rows that live, d_h + d_output: taken from what is carried. d_output may be
// null.
template <typename scalar_t, typename acc_t>
struct TakeProjected {
  const scalar_t* d_output;
  const int64_t* lengths;
  int64_t t;
  acc_t* d_h;
  scalar_t* d_projected;  // zero where the row is dead
};

// Rows of a dense sequence [T, B]: zero past the ends, whatever was there.
template <typename scalar_t>
struct RealRows {
  const scalar_t* from;
  const int64_t* lengths;
  int64_t B;
  scalar_t* to;
};

// h before the step of each row of a sequence: zero where the row is dead or reset. Values are copied, of any type.
struct HBefore {
  Steps steps;             // without an order
  int64_t row_bytes;       // P * sizeof(scalar_t)
  const int64_t* lengths;  // [B] or null; in reverse a row begins at its end
  const uint8_t* reset;    // [N] or null
  const void* h0;          // [B, P]
  const void* output;      // [N, P]
  void* to;                // [N, P]
};

// Of a cell that resets before, between its two products. Rows of H values; what is null as above.

// r and z from the first product, and m = r h, which the second one reads.
template <typename scalar_t, typename acc_t>
struct ResetForward {
  int64_t H;
  const scalar_t* x_gates;  // [rows, 3*H]
  const scalar_t* h_gates;  // [rows, 2*H]  the first product
  const scalar_t* h_in;     // [rows, H]  what it read
  StepControls<scalar_t> controls;
  acc_t* z;               // [rows, H]
  scalar_t* m;            // [rows, H]
  scalar_t* saved_gates;  // [rows, 3*H] or null
};
// n and h' from the second.
template <typename scalar_t, typename acc_t>
struct ResetFinish {
  int64_t H;
  const scalar_t* x_gates;  // [rows, 3*H]
  const scalar_t* product;  // [rows, H]
  const scalar_t* h_prev;   // [rows, H]  may be h_state
  const acc_t* z;           // [rows, H]
  StepControls<scalar_t> controls;
  scalar_t* h_next;       // [rows, H]
  scalar_t* h_state;      // [rows, H]  h_next for the rows that live
  scalar_t* saved_gates;  // [rows, 3*H] or null
};
// The gradients of n and z, and what goes past the products.
template <typename scalar_t, typename acc_t>
struct ResetFinishBackward {
  int64_t H;
  const scalar_t* saved_gates;  // [rows, 3*H]
  const scalar_t* h_prev;       // [rows, H]
  const scalar_t* d_output;     // [rows, H] or null
  StepControls<scalar_t> controls;
  acc_t* d_h;             // [rows, H]
  scalar_t* d_x_gates;    // [rows, 3*H]
  scalar_t* d_h_gates;    // [rows, 2*H]
  scalar_t* d_projected;  // [rows, H]  gradient of the second product
};
// That of r, from that of m.
template <typename scalar_t, typename acc_t>
struct ResetBackward {
  int64_t H;
  const scalar_t* saved_gates;  // [rows, 3*H]
  const scalar_t* h_prev;       // [rows, H]
  const scalar_t* h_mask;       // [rows, H] or null
  const scalar_t* d_m;          // [rows, H]
  StepControls<scalar_t> controls;
  acc_t* d_h;           // [rows, H]
  scalar_t* d_x_gates;  // [rows, 3*H]
  scalar_t* d_h_gates;  // [rows, 2*H]
};
// m again.
template <typename scalar_t>
struct ResetProduct {
  int64_t H;
  const scalar_t* saved_gates;  // [rows, 3*H]
  const scalar_t* h_in;         // [rows, H]
  scalar_t* m;                  // [rows, H]
};

#if defined(FASTRNN_WITH_CUDA) || defined(FASTRNN_EMULATE)
// Stream is a cudaStream_t and the result a cudaError_t; spelled so that this header needs no CUDA header.
using CudaStream = void*;
using CudaStatus = int;
template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_gates_forward(const GatesForward<scalar_t, acc_t>&, CudaStream);
template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_gates_backward(const GatesBackward<scalar_t, acc_t>&, CudaStream);
// The same, of the cells that normalise.
template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_norm_forward(const GatesForward<scalar_t, acc_t>&, CudaStream);
template <template <typename> class Cell, typename scalar_t, typename acc_t>
CudaStatus launch_norm_backward(const GatesBackward<scalar_t, acc_t>&, CudaStream);
// Instantiated for the updates of h, and for the steps of a cell that resets before.
template <class Update>
CudaStatus launch_update_h(int64_t rows, int64_t width, const Update&, CudaStream);
CudaStatus launch_h_before(const HBefore&, CudaStream);
const char* cuda_status_string(CudaStatus);
#endif

}  // namespace fastrnn
