// Mean and M2 (the sum of squared deviations) of every channel of a part, and their merge: Chan, Golub, LeVeque,
// "Algorithms for computing the sample variance", The American Statistician 37, 1983. Never a sum of squares.
#pragma once

#include <cstdint>

#include "partition.h"
#include "storage.h"
#include "vectors.h"

namespace resfused {

// One pack of each of some rows, a power of two, all in registers: what is taken of them is taken by halves.
template <int ROWS, class A>
struct Column {
  Column<ROWS / 2, A> above, below;
  template <class Elements, class N>
  INLINE Column(Elements x, int64_t stride, int64_t i, N n)
      : above(x, stride, i, n), below(x, stride, i + ROWS / 2 * stride, n) {}
  INLINE Pack<A> sum() const { return above.sum() + below.sum(); }
  INLINE Pack<A> spread(Pack<A> centre) const { return above.spread(centre) + below.spread(centre); }
};
template <class A>
struct Column<1, A> {
  Pack<A> value;
  template <class Elements, class N>
  INLINE Column(Elements x, int64_t, int64_t i, N n) : value(x.load(i, n)) {}
  INLINE Pack<A> sum() const { return value; }
  INLINE Pack<A> spread(Pack<A> centre) const { return (value - centre) * (value - centre); }
};

// The mean and M2 of ROWS rows, channel by channel, merged into those of the ``count`` rows before. Means are kept less
// those of the first group, or late groups would move them by less than their rounding.
template <int ROWS, class Elements, class A>
inline void add_rows(Elements x, int64_t channels, int64_t count, A* pivot, A* mean, A* m2) {
  const Pack<A> one_of = all(A(1) / ROWS), share = all(A(ROWS) / A(count + ROWS));
  const Pack<A> weight = all(A(ROWS) * A(count) / A(count + ROWS));
  walk<A>(channels, [&](int64_t i, auto n) INLINED {
    const Column<ROWS, A> column(x, channels, i, n);
    const Pack<A> centre = column.sum() * one_of, spread = column.spread(centre);
    if (count == 0) {
      store(pivot + i, centre);
      store(mean + i, zeros<A>());
      store(m2 + i, spread);
    } else {
      const Pack<A> old = load(mean + i), delta = (centre - load(pivot + i)) - old;
      store(mean + i, fma(delta, share, old));
      store(m2 + i, fma(delta * delta, weight, load(m2 + i) + spread));
    }
  });
}

// The mean and M2 of every channel in a part, each into a row; ``pivot`` is room for one more.
template <class A, class Elements>
void moments(const ChannelsLast& p, int64_t part, int64_t, Elements x, A* mean, A* m2, A* pivot) {
  const int64_t channels = p.stride(), rows = p.count(part);
  x = x + part * p.rows_each() * channels;
  int64_t m = 0;
  const auto group = [&](auto size) {
    constexpr int kRows = decltype(size)::value;
    for (; m + kRows <= rows; m += kRows) {
      add_rows<kRows>(x + m * channels, channels, m, pivot, mean, m2);
    }
  };
  group(std::integral_constant<int, 8>{});
  group(std::integral_constant<int, 4>{});
  group(std::integral_constant<int, 2>{});
  group(std::integral_constant<int, 1>{});
  walk<A>(channels, [&](int64_t i, auto) { store(mean + i, load(mean + i) + load(pivot + i)); });
}

// The same for a block of channels, in two passes over the planes, of which the second finds them in the cache.
template <class A, class Elements>
void moments(const Contiguous& p, int64_t part, int64_t block, Elements x, A* mean, A* m2, A*) {
  const int64_t first = block * p.channels_each();
  const double count = static_cast<double>(p.count(part));
  Pack<A> sums[kChannels], squares[kChannels];
  A centres[kChannels];
  for (int64_t c = 0; c < p.channels_each(); c++) sums[c] = squares[c] = zeros<A>();
  p.spans(part, block, [&](Span s) {
    const Elements at = x + s.at;
    Pack<A> sum[4] = {sums[s.c - first], zeros<A>(), zeros<A>(), zeros<A>()};
    unrolled<A>(s.n, [&](int64_t i, auto n, int u) INLINED { sum[u] = sum[u] + at.load(i, n); });
    sums[s.c - first] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  });
  for (int64_t c = 0; c < p.channels_each(); c++) {
    centres[c] = static_cast<A>(total(sums[c]) / count);
    sums[c] = zeros<A>();
  }
  p.spans(part, block, [&](Span s) {
    const Elements at = x + s.at;
    const Pack<A> centre = all(centres[s.c - first]);
    Pack<A> sum[2] = {sums[s.c - first], zeros<A>()}, square[2] = {squares[s.c - first], zeros<A>()};
    unrolled<A>(s.n, [&](int64_t i, auto n, int u) INLINED {
      const Pack<A> deviation = only(n, at.load(i, n) - centre);
      sum[u % 2] = sum[u % 2] + deviation;
      square[u % 2] = fma(deviation, deviation, square[u % 2]);
    });
    sums[s.c - first] = sum[0] + sum[1];
    squares[s.c - first] = square[0] + square[1];
  });
  // What the rounding of the centre left out.
  for (int64_t c = 0; c < p.channels_in(block); c++) {
    const double rest = total(sums[c]);
    mean[first + c] = static_cast<A>(centres[c] + rest / count);
    m2[first + c] = static_cast<A>(total(squares[c]) - rest * rest / count);
  }
}

// Mean and M2 of a block's channels over all parts, of which each has ``rows`` rows, means in ``row`` and M2 after it.
template <class A, class Partition>
void merge_moments(const Partition& p, int64_t block, const Rows<A>& partials, int64_t row, int64_t rows, double* mean,
                   double* m2) {
  const int64_t first = block * p.channels_each(), n = p.channels_in(block), parts = p.parts();
  double count = 0;
  std::fill_n(mean, n, 0.0);
  std::fill_n(m2, n, 0.0);
  for (int64_t part = 0; part < parts; part++) {
    const A* means = partials[part * rows + row] + first;
    const double values = static_cast<double>(p.count(part));
    for (int64_t c = 0; c < n; c++) mean[c] += values * means[c];
    count += values;
  }
  for (int64_t c = 0; c < n; c++) mean[c] /= count;
  for (int64_t part = 0; part < parts; part++) {
    const A *means = partials[part * rows + row] + first, *m2s = partials[part * rows + row + 1] + first;
    const double values = static_cast<double>(p.count(part));
    for (int64_t c = 0; c < n; c++) {
      const double deviation = means[c] - mean[c];
      m2[c] += m2s[c] + values * deviation * deviation;
    }
  }
}

}  // namespace resfused
