// SPDX-License-Identifier: BSD-3-Clause
// The path "gates", once for a whole sequence: h before the step of each row, which the gradient of the recurrent
// weight multiplies. Each value is read and written once, 16 bytes an instruction where rows and addresses allow it.
//
// A launch takes the rows of its steps as parameters, so that nothing has to be copied to the device before it.
#include "gates.cuh"

namespace fastrnn {
namespace {

constexpr int kSteps = 480;  // of one launch

struct StepsOfLaunch {
  int64_t first, width;  // the first step's time; pieces of a row
  HBefore of;            // its steps belong to the host
  // Of the times from first - 1 to first + kSteps + 1. Those before the sequence and after it have no rows.
  int64_t row_begin[kSteps + 3];
};
static_assert(sizeof(StepsOfLaunch) <= 4096);  // what parameters may take

template <typename Piece>
__global__ void __launch_bounds__(RowTiling::kThreads) h_before_kernel(const __grid_constant__ StepsOfLaunch p) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= p.width) return;
  const int direction = p.of.steps.reverse ? 1 : -1;
  const int64_t t = p.first + blockIdx.z;
  const int64_t *const here = p.row_begin + 1 + blockIdx.z, *const before = here + direction;
  const int64_t count = here[1] - here[0], count_before = before[1] - before[0];
  const auto piece_of = [&](const void* rows, int64_t row) {
    return static_cast<const Piece*>(rows)[row * p.width + at];
  };
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < count; b += int64_t{gridDim.y} * blockDim.y) {
    const int64_t row = here[0] + b, end = p.of.lengths ? p.of.lengths[b] : t + 2;
    Piece piece{};
    if (t < end && !(p.of.reset && p.of.reset[row])) {
      const bool begun = b < count_before && t + direction < end;
      piece = begun ? piece_of(p.of.output, before[0] + b) : piece_of(p.of.h0, b);
    }
    static_cast<Piece*>(p.of.to)[row * p.width + at] = piece;
  }
}

template <typename Piece>
bool moves(const HBefore& p) {
  const auto allows = [](uintptr_t value) { return value % sizeof(Piece) == 0; };
  return allows(p.row_bytes) && allows(reinterpret_cast<uintptr_t>(p.h0)) &&
         allows(reinterpret_cast<uintptr_t>(p.output)) && allows(reinterpret_cast<uintptr_t>(p.to));
}

}  // namespace

CudaStatus launch_h_before(const HBefore& p, CudaStream stream) {
  const bool wide = moves<uint4>(p), narrow = !moves<uint32_t>(p);
  StepsOfLaunch part{0, p.row_bytes / static_cast<int64_t>(wide ? 16 : narrow ? 2 : 4), p, {}};
  for (; part.first < p.steps.T; part.first += kSteps) {
    for (int i = 0; i < kSteps + 3; ++i) {
      part.row_begin[i] = p.steps.row_begin[std::clamp<int64_t>(part.first - 1 + i, 0, p.steps.T)];
    }
    const int64_t rows = part.row_begin[2] - part.row_begin[1];  // later steps have no more
    if (rows == 0 || part.width == 0) break;
    RowTiling tiling(rows, part.width);
    tiling.grid.z = static_cast<unsigned>(std::min<int64_t>(kSteps, p.steps.T - part.first));
    const cudaError_t status = launch(wide     ? h_before_kernel<uint4>
                                      : narrow ? h_before_kernel<uint16_t>
                                               : h_before_kernel<uint32_t>,
                                      {tiling.grid, tiling.block}, static_cast<cudaStream_t>(stream), part);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace fastrnn
