// SPDX-License-Identifier: BSD-3-Clause
// Layer normalisation of a row, forward and backward. Compiled once for each instruction set, after tile.h.

namespace fastrnn::FASTRNN_ISA {

// A vector without what lies past the end of the row.
template <typename T>
FASTRNN_HD Vec<T> only(Vec<T> v, AllLanes) {
  return v;
}
template <typename T>
FASTRNN_HD Vec<T> only(Vec<T> v, int lanes) {
  T first[kWidth<T>];
  store(first, v);
  return load(first, lanes);
}

template <typename T>
FASTRNN_HD T sum_of(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < kWidth<T>; ++i) sum += v[i];
  return sum;
}

// Of the row a [n].
template <typename T, typename A>
Statistics<T> statistics(const A* a, int64_t n) {
  Vec<T> sum{}, squares{};
  for_each_vector<T>(0, n, n, [&](int64_t j, auto lanes) FASTRNN_INLINE { sum += load(a + j, lanes); });
  const T mean = sum_of<T>(sum) / static_cast<T>(n);
  for_each_vector<T>(0, n, n, [&](int64_t j, auto lanes) FASTRNN_INLINE {
    squares += only<T>(Statistics<T>::squared_deviation(load(a + j, lanes), mean), lanes);
  });
  return Statistics<T>::of(mean, sum_of<T>(squares) / static_cast<T>(n));
}

// Calls f(j, y, lanes) with y = gain LN(a) + bias, for all of the row a [n].
template <typename T, typename A, typename F>
FASTRNN_HD void normalise(const A* a, const T* gain, const T* bias, int64_t n, F f) {
  const Statistics<T> s = statistics<T>(a, n);
  for_each_vector<T>(0, n, n, [&](int64_t j, auto lanes) FASTRNN_INLINE {
    f(j, load(gain + j, lanes) * s.normalised(load(a + j, lanes)) + load(bias + j, lanes), lanes);
  });
}

// Calls f(j, d_a, lanes) with the gradient of the row a [n], from d, that of gain LN(a) + bias. Adds those of gain and
// bias.
template <typename T, typename A, typename F>
FASTRNN_HD void normalise_backward(const A* a, const T* gain, const T* d, int64_t n, T* d_gain, T* d_bias, F f) {
  const Statistics<T> s = statistics<T>(a, n);
  Vec<T> sum{}, sum_normalised{};
  for_each_vector<T>(0, n, n, [&](int64_t j, auto lanes) FASTRNN_INLINE {
    const Vec<T> normalised = s.normalised(load(a + j, lanes)), d_y = load(d + j, lanes);
    const Vec<T> d_normalised = d_y * load(gain + j, lanes);
    sum += d_normalised;
    sum_normalised += d_normalised * normalised;
    store(d_gain + j, load(d_gain + j, lanes) + d_y * normalised, lanes);
    store(d_bias + j, load(d_bias + j, lanes) + d_y, lanes);
  });
  const T mean = sum_of<T>(sum) / static_cast<T>(n), mean_normalised = sum_of<T>(sum_normalised) / static_cast<T>(n);
  for_each_vector<T>(0, n, n, [&](int64_t j, auto lanes) FASTRNN_INLINE {
    const Vec<T> normalised = s.normalised(load(a + j, lanes));
    const Vec<T> d_normalised = load(d + j, lanes) * load(gain + j, lanes);
    f(j, s.gradient(normalised, d_normalised, mean, mean_normalised), lanes);
  });
}

}  // namespace fastrnn::FASTRNN_ISA
