// SPDX-License-Identifier: BSD-3-Clause
// Checks csrc/cells alone, without torch or Python:
//   g++ -std=c++17 -O2 -I csrc tests/native/cells_test.cpp && ./a.out
//   nvcc -std=c++17 -x cu -I csrc tests/native/cells_test.cpp && ./a.out    (the functions also on the device, if any)
// Prints the measured error of every function; the exit status is the number of failed checks.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

int failures = 0;

__attribute__((format(printf, 2, 3))) void expect(bool holds, const char* format, ...) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: ");
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::printf("\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// Elementary functions. The bounds are those of cells/math.h.

constexpr double kMaxUlpDouble = 2.5;

struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr double kMaxUlp = 2.49;
  template <typename T>
  FASTRNN_HD T operator()(T x) const {
    return fastrnn::sigmoid(x);
  }
  template <typename Wide>
  static Wide exact(Wide x) {
    return 1 / (1 + std::exp(-x));
  }
};

struct Tanh {
  static constexpr const char* kName = "tanh";
  static constexpr double kMaxUlp = 2.5;
  template <typename T>
  FASTRNN_HD T operator()(T x) const {
    return fastrnn::tanh(x);
  }
  template <typename Wide>
  static Wide exact(Wide x) {
    return std::tanh(x);
  }
};

struct MaxError {
  double ulp = 0, ulp_at = 0;
  double absolute = 0, absolute_at = 0;

  // The unit in the last place is that of T at `exact`, subnormal results included.
  template <typename T, typename Wide>
  void add(T x, T got, Wide exact) {
    const Wide error = std::fabs(static_cast<Wide>(got) - exact);
    const int exponent = std::max(std::ilogb(exact), std::numeric_limits<T>::min_exponent - 1);
    const double in_ulp = static_cast<double>(std::ldexp(error, std::numeric_limits<T>::digits - 1 - exponent));
    if (!(in_ulp <= ulp)) ulp = in_ulp, ulp_at = x;
    if (!(static_cast<double>(error) <= absolute)) absolute = static_cast<double>(error), absolute_at = x;
  }
};

template <class Function>
void report(const char* type, const MaxError& error, double bound) {
  std::printf("%-8s %-14s max error %.3f ulp at %.9g, %.3g absolute at %.9g\n", Function::kName, type, error.ulp,
              error.ulp_at, error.absolute, error.absolute_at);
  expect(error.ulp <= bound, "%s %s: expected at most %.2f ulp", Function::kName, type, bound);
}

// Every kStep-th float: all binades, both signs. Where sigmoid would be subnormal it may also be 0.
std::vector<float> float_sweep(float lowest) {
  constexpr uint64_t kStep = 101;
  std::vector<float> sweep;
  for (uint64_t bits = 0; bits <= UINT32_MAX; bits += kStep) {
    const float x = fastrnn::bit_cast<float>(static_cast<uint32_t>(bits));
    if (std::isfinite(x) && x >= lowest) sweep.push_back(x);
  }
  return sweep;
}

template <class Function>
void check_floats(const char* where, const std::vector<float>& xs, const std::vector<float>& ys) {
  MaxError error;
  for (size_t i = 0; i < xs.size(); ++i) error.add(xs[i], ys[i], Function::exact(static_cast<double>(xs[i])));
  report<Function>(where, error, Function::kMaxUlp);
}

#ifdef __CUDACC__
template <class Function>
__global__ void evaluate_kernel(const float* x, float* y, size_t n) {
  const size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  if (i < n) y[i] = Function{}(x[i]);
}

template <class Function>
void check_floats_on_device(const std::vector<float>& xs) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return;
  float *x = nullptr, *y = nullptr;
  std::vector<float> ys(xs.size());
  const size_t bytes = xs.size() * sizeof(float);
  cudaMalloc(&x, bytes);
  cudaMalloc(&y, bytes);
  cudaMemcpy(x, xs.data(), bytes, cudaMemcpyHostToDevice);
  evaluate_kernel<Function><<<static_cast<unsigned>((xs.size() + 255) / 256), 256>>>(x, y, xs.size());
  cudaMemcpy(ys.data(), y, bytes, cudaMemcpyDeviceToHost);
  expect(cudaGetLastError() == cudaSuccess, "%s: CUDA error", Function::kName);
  cudaFree(x);
  cudaFree(y);
  check_floats<Function>("float, device", xs, ys);
}
#endif

template <class Function>
void check_accuracy(float lowest) {
  const std::vector<float> xs = float_sweep(lowest);
  std::vector<float> ys(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) ys[i] = Function{}(xs[i]);
  check_floats<Function>("float", xs, ys);
#ifdef __CUDACC__
  check_floats_on_device<Function>(xs);
#endif
  MaxError error;
  for (double x = -40; x <= 40; x += 0.00013) error.add(x, Function{}(x), Function::exact(static_cast<long double>(x)));
  for (double x = -708; x < -40; x += 0.0137) error.add(x, Function{}(x), Function::exact(static_cast<long double>(x)));
  for (double x = 1; x > DBL_MIN; x *= 0.73) error.add(x, Function{}(x), Function::exact(static_cast<long double>(x)));
  report<Function>("double", error, kMaxUlpDouble);
}

// Where the cells use them: exp of what is not positive, log_sigmoid of anything. The bounds are those of cells/math.h.
void check_exponentials() {
  double worst_exp = 0, worst_log = 0, worst_double_exp = 0, worst_double_log = 0;
  for (double x = -100; x <= 100; x += 0.00037) {
    const float at = static_cast<float>(x);
    const double log_sigmoid = std::fmin(at, 0.0) - std::log1p(std::exp(-std::fabs(double(at))));
    worst_log = std::fmax(worst_log, std::fabs(fastrnn::log_sigmoid(at) - log_sigmoid) / (1 + std::fabs(at)));
    if (at > 0) continue;
    const double exp = at < -87 ? 0 : std::exp(double(at));
    worst_exp = std::fmax(worst_exp, std::fabs(fastrnn::exp(at) - exp) / std::fmax(exp, double(FLT_MIN)));
    const long double wide = x, wide_exp = std::exp(wide), wide_log = wide - std::log1p(wide_exp);
    const auto relative = static_cast<double>(std::fabs(fastrnn::exp(x) - wide_exp) / wide_exp);
    const auto absolute = static_cast<double>(std::fabs(fastrnn::log_sigmoid(x) - wide_log));
    worst_double_exp = std::fmax(worst_double_exp, relative);
    worst_double_log = std::fmax(worst_double_log, absolute / (1 + std::fabs(x)));
  }
  std::printf("exp      float          max error %.3g relative, log_sigmoid %.3g of 1 + |x|\n", worst_exp, worst_log);
  expect(worst_exp <= 2e-7, "float exp: expected at most 2e-7 relative");
  expect(worst_log <= 2e-7, "float log_sigmoid: expected at most 2e-7 of 1 + |x|");
  std::printf("exp      double         max error %.3g relative, log_sigmoid %.3g of 1 + |x|\n", worst_double_exp,
              worst_double_log);
  expect(worst_double_exp <= 2e-16, "double exp: expected at most 2e-16 relative");
  expect(worst_double_log <= 2e-16, "double log_sigmoid: expected at most 2e-16 of 1 + |x|");
  expect(fastrnn::exp(-1000.0) == 0 && std::isnan(fastrnn::exp(double(NAN))), "double exp: its limits");
  expect(fastrnn::exp(-1000.0f) == 0 && std::isnan(fastrnn::exp(NAN)), "float exp: its limits");
  expect(fastrnn::log_sigmoid(1000.0f) == 0 && fastrnn::log_sigmoid(-1e30f) == -1e30f &&
             std::isnan(fastrnn::log_sigmoid(NAN)),
         "float log_sigmoid: its limits");
}

template <typename T>
void check_limits(const char* type) {
  constexpr T kInf = std::numeric_limits<T>::infinity(), kMax = std::numeric_limits<T>::max();
  const T nan = std::numeric_limits<T>::quiet_NaN();
  struct {
    T x, sigmoid, tanh;
  } const rows[] = {{kInf, 1, 1},   {kMax, 1, 1},      {T(1000), 1, 1},   {-kInf, 0, -1},
                    {-kMax, 0, -1}, {T(-1000), 0, -1}, {T(0), T(0.5), 0}, {-T(0), T(0.5), 0}};
  for (const auto& row : rows) {
    const T s = fastrnn::sigmoid(row.x), t = fastrnn::tanh(row.x);
    expect(s == row.sigmoid, "%s sigmoid(%g) == %g, got %g", type, row.x, row.sigmoid, s);
    expect(t == row.tanh, "%s tanh(%g) == %g, got %g", type, row.x, row.tanh, t);
    expect(fastrnn::relu(row.x) == (row.x > 0 ? row.x : 0), "%s relu(%g)", type, row.x);
  }
  expect(std::isnan(fastrnn::sigmoid(nan)), "%s sigmoid(NaN) is NaN", type);
  expect(std::isnan(fastrnn::tanh(nan)), "%s tanh(NaN) is NaN", type);
  expect(std::isnan(fastrnn::relu(nan)), "%s relu(NaN) is NaN", type);
}

// ---------------------------------------------------------------------------------------------------------------------
// Cells

// One step of one unit, forward and backward.
template <template <typename> class Cell, typename T>
struct Step {
  using C = Cell<T>;
  // inputs
  fastrnn::Values<T, C::kGates> gx, gh;
  fastrnn::Values<T, C::kParameters> w;
  fastrnn::Values<T, C::kStates> prev, d_next;
  // outputs
  fastrnn::Values<T, C::kStates> next, d_prev;
  fastrnn::Values<T, C::kGates> d_gx, d_gh;
  fastrnn::Values<T, C::kSaved> saved;

  void run() {
    C::forward(gx, gh, w, prev, next, saved);
    C::backward(w, saved, prev, next, d_next, d_prev, d_gx, d_gh);
  }
};

// Calls visit(name, index, value of each step...) for every input, or for every output.
template <class Visit, class... Steps>
void for_each_input(Visit visit, Steps&... steps) {
  using C = typename std::tuple_element_t<0, std::tuple<Steps...>>::C;
  for (int k = 0; k < C::kGates; ++k) visit("gx", k, steps.gx[k]...);
  for (int k = 0; k < C::kGates; ++k) visit("gh", k, steps.gh[k]...);
  for (int k = 0; k < C::kParameters; ++k) visit("w", k, steps.w[k]...);
  for (int k = 0; k < C::kStates; ++k) visit("prev", k, steps.prev[k]...);
  for (int k = 0; k < C::kStates; ++k) visit("d_next", k, steps.d_next[k]...);
}

template <class Visit, class... Steps>
void for_each_output(Visit visit, Steps&... steps) {
  using C = typename std::tuple_element_t<0, std::tuple<Steps...>>::C;
  for (int k = 0; k < C::kStates; ++k) visit("next", k, steps.next[k]...);
  for (int k = 0; k < C::kSaved; ++k) visit("saved", k, steps.saved[k]...);
  for (int k = 0; k < C::kGates; ++k) visit("d_gx", k, steps.d_gx[k]...);
  for (int k = 0; k < C::kGates; ++k) visit("d_gh", k, steps.d_gh[k]...);
  for (int k = 0; k < C::kStates; ++k) visit("d_prev", k, steps.d_prev[k]...);
}

// The last state of the sLSTM is m, to which c and n are relative, and which has no gradient.
template <template <typename> class Cell>
constexpr bool kHasStabilizer = Cell<double>::kStates == 4;

// Random inputs exact in float; one step in eight is far into saturation.
template <template <typename> class Cell>
Step<Cell, double> random_step(std::mt19937& random) {
  std::normal_distribution<float> normal;
  const float scale = random() % 8 == 0 ? 50.0f : 1.0f;
  Step<Cell, double> step{};
  for_each_input([&](const char*, int, double& value) { value = scale * normal(random); }, step);
  if (kHasStabilizer<Cell>) step.prev[2] = 1 + std::fabs(step.prev[2]);  // n of the sLSTM is 1 or more, or 0
  return step;
}

// The gradients of sum(d_next * next) against central differences. Their error is about width^2 + eps / width, which
// is below 1e-9 here; a step across the kink of relu has no derivative and is left out.
template <template <typename> class Cell>
void check_derivatives(const char* name, std::mt19937& random) {
  constexpr double kWidth = 1e-5, kTolerance = 1e-8;
  for (int trial = 0; trial < 2000; ++trial) {
    Step<Cell, double> step = random_step<Cell>(random);
    if (std::fabs(step.gx[0] + step.gh[0]) < 4 * kWidth) continue;
    step.run();
    double scale = 1;
    for (double d : step.d_next) scale += std::fabs(d);
    for (double h : step.prev) scale *= 1 + std::fabs(h);
    for (double g : step.gh) scale *= 1 + std::fabs(g);
    for (double w : step.w) scale *= 1 + std::fabs(w);

    constexpr int kStates = Cell<double>::kStates - kHasStabilizer<Cell>;  // that have a gradient
    const auto objective = [&](Step<Cell, double> moved) {
      moved.run();
      double sum = moved.d_next[0] * moved.next[0];
      const double relative = kHasStabilizer<Cell> ? std::exp(moved.next[kStates] - step.next[kStates]) : 1;
      for (int k = 1; k < kStates; ++k) sum += moved.d_next[k] * moved.next[k] * relative;
      return sum;
    };
    const auto check = [&](const char* input, int k, double& value, double gradient) {
      const double at = value;
      value = at + kWidth;
      const double above = objective(step);
      value = at - kWidth;
      const double below = objective(step);
      value = at;
      const double numerical = (above - below) / (2 * kWidth);
      expect(std::fabs(gradient - numerical) <= kTolerance * scale,
             "%s: gradient of %s[%d]: got %.12g, numerical %.12g", name, input, k, gradient, numerical);
    };
    for (int k = 0; k < Cell<double>::kGates; ++k) check("gx", k, step.gx[k], step.d_gx[k]);
    for (int k = 0; k < Cell<double>::kGates; ++k) check("gh", k, step.gh[k], step.d_gh[k]);
    for (int k = 0; k < kStates; ++k) check("prev", k, step.prev[k], step.d_prev[k]);
    if constexpr (Cell<double>::kParameters > 0) {
      using C = Cell<double>;
      for (int k = 0; k < C::kParameters; ++k) {
        const double seen = C::parameter_sees_next(k) ? step.next[1] : step.prev[1];
        check("w", k, step.w[k], step.d_gx[C::parameter_gate(k)] * seen);
      }
    }
  }
}

template <template <typename> class Cell>
void check_float_against_double(const char* name, std::mt19937& random) {
  double worst = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    Step<Cell, double> wide = random_step<Cell>(random);
    Step<Cell, float> narrow{};
    double scale = 1;
    for_each_input(
        [&](const char*, int, double& from, float& to) {
          to = static_cast<float>(from);
          scale *= 1 + std::fabs(from);
        },
        wide, narrow);
    wide.run();
    narrow.run();
    for_each_output(
        [&](const char* output, int k, double& expected, float& got) {
          const double error = std::fabs(got - expected) / (scale * FLT_EPSILON);
          worst = std::fmax(worst, error);
          expect(error <= 1, "%s: %s[%d] in float: got %.9g, in double %.9g", name, output, k, got, expected);
        },
        wide, narrow);
  }
  std::printf("%-8s float          max error %.3f eps of the scale of the inputs\n", name, worst);
}

// One function body serves vectors and scalars: lane by lane the same result, also beside a NaN. Where there are fused
// multiply-adds, the compiler may fuse another product of a sum: the results differ by a rounding then.
#ifndef __CUDACC__
typedef float FloatVector __attribute__((vector_size(64)));
typedef double DoubleVector __attribute__((vector_size(64)));

template <template <typename> class Cell, typename Vector>
void check_vector(const char* name, std::mt19937& random) {
  using Scalar = typename fastrnn::ValueTraits<Vector>::Scalar;
  constexpr int kLanes = sizeof(Vector) / sizeof(Scalar);
  for (int trial = 0; trial < 500; ++trial) {
    Step<Cell, Vector> vectors{};
    Step<Cell, Scalar> scalars[kLanes]{};
    for (int lane = 0; lane < kLanes; ++lane) {
      Step<Cell, double> drawn = random_step<Cell>(random);
      if (lane == trial % (2 * kLanes)) drawn.gx[0] = std::nan("");
      for_each_input([&](const char*, int, double& from, Scalar& scalar,
                         Vector& vector) { vector[lane] = scalar = static_cast<Scalar>(from); },
                     drawn, scalars[lane], vectors);
      scalars[lane].run();
    }
    vectors.run();
    for (int lane = 0; lane < kLanes; ++lane) {
      double rounding = 0;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
      rounding = std::numeric_limits<Scalar>::epsilon();
      for_each_input([&](const char*, int, Scalar& value) { rounding *= 1 + std::fabs(value); }, scalars[lane]);
#endif
      for_each_output(
          [&](const char* output, int k, Scalar& expected, Vector& vector) {
            const Scalar got = vector[lane];
            expect(
                std::fabs(got - expected) <= rounding || got == expected || (std::isnan(got) && std::isnan(expected)),
                "%s: %s[%d] of lane %d: got %.17g, as a scalar %.17g", name, output, k, lane, double(got),
                double(expected));
          },
          scalars[lane], vectors);
    }
  }
}
#endif

template <template <typename> class Cell>
void check_cell(const char* name) {
  std::mt19937 random(0);
  check_derivatives<Cell>(name, random);
  check_float_against_double<Cell>(name, random);
#ifndef __CUDACC__
  check_vector<Cell, FloatVector>(name, random);
  check_vector<Cell, DoubleVector>(name, random);
#endif
}

}  // namespace

int main() {
  check_accuracy<Sigmoid>(-87.3f);  // below, the result is subnormal
  check_accuracy<Tanh>(-FLT_MAX);
  check_limits<float>("float");
  check_limits<double>("double");
  check_exponentials();
#define FASTRNN_CHECK_CELL(name, Cell) check_cell<fastrnn::Cell>(#name);
  FASTRNN_FOR_EACH_UNIT_CELL(FASTRNN_CHECK_CELL)
  std::printf("%d failed checks\n", failures);
  return failures > 255 ? 255 : failures;
}
