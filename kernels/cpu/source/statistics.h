// Mean and M2 (the sum of squared deviations) of every channel of a part, and their merge: Chan, Golub, LeVeque,
// "Algorithms for computing the sample variance", The American Statistician 37, 1983. Within a part deviations are
// taken from a pivot, the mean of its first values: however far that lies off, a part of n values has at least 1/n of
// the squares about it as its M2, so that no more than a factor n of a rounding is lost where they are put right.
#pragma once

#include <algorithm>
#include <cstdint>

#include "partition.h"
#include "storage.h"
#include "vectors.h"

namespace resfused {

// The sums of some deviations and of their squares.
template <class A>
struct Deviations {
  Pack<A> sum, squares;
  INLINE void add(Pack<A> deviation) {
    sum = sum + deviation;
    squares = fma(deviation, deviation, squares);
  }
  INLINE Deviations operator+(const Deviations& other) const { return {sum + other.sum, squares + other.squares}; }
};

// Of one pack of each of some rows, a power of two: by halves, so that chains of additions are short.
template <int ROWS, class A, class Elements, class N>
INLINE Deviations<A> of_rows(Elements x, int64_t stride, int64_t i, N n, Pack<A> pivot) {
  if constexpr (ROWS == 1) {
    const Pack<A> deviation = x.load(i, n) - pivot;
    return {deviation, deviation * deviation};
  } else {
    const auto above = of_rows<ROWS / 2, A>(x, stride, i, n, pivot);
    return above + of_rows<ROWS / 2, A>(x, stride, i + ROWS / 2 * stride, n, pivot);
  }
}

// The pivot of every channel: the mean of its first ROWS rows.
template <int ROWS, class Elements, class A>
inline void find_pivots(Elements x, int64_t stride, int64_t channels, A* pivot) {
  walk<A>(channels, [&](int64_t i, auto n) INLINED {
    store(pivot + i, of_rows<ROWS, A>(x, stride, i, n, zeros<A>()).sum * all(A(1) / ROWS));
  });
}

// Adds ROWS rows to the sums of the deviations from the pivot, channel by channel. Eight at a time read and write the
// sums an eighth as often; sixteen took longer.
template <int ROWS, class Elements, class A>
inline void add_rows(Elements x, int64_t stride, int64_t channels, const A* pivot, A* sums, A* squares) {
  walk<A>(channels, [&](int64_t i, auto n) INLINED {
    const Deviations<A> found = of_rows<ROWS, A>(x, stride, i, n, load(pivot + i));
    // Beyond the last row of a part the columns are those of others.
    Typed<A>(sums).store(i, n, load(sums + i) + found.sum, false);
    Typed<A>(squares).store(i, n, load(squares + i) + found.squares, false);
  });
}

// What is known while rows are added up: a row of pivots, of sums and of squares.
enum Moments : int { kPivot, kSum, kSquares, kMomentRows };

// The mean and M2 of every one of ``channels`` with ``count`` values, from the sums.
template <class A>
void finish_moments(const Rows<A>& sums, int64_t channels, int64_t count, A* mean, A* m2) {
  const Pack<A> one_of = all(A(1) / A(count));
  walk<A>(channels, [&](int64_t i, auto) INLINED {
    const Pack<A> sum = load(sums[kSum] + i), shift = sum * one_of;
    store(mean + i, load(sums[kPivot] + i) + shift);
    store(m2 + i, fma(zeros<A>() - sum, shift, load(sums[kSquares] + i)));
  });
}

// The mean and M2 of every one of ``channels`` over some rows, ``stride`` apart.
template <class A, class Elements>
void moments(Elements x, int64_t stride, int64_t channels, int64_t rows, A* mean, A* m2) {
  Rows<A> sums(kMomentRows, channels);
  std::fill_n(sums[kSum], 2 * sums.stride(), A(0));
  rows < 8 ? find_pivots<1>(x, stride, channels, sums[kPivot]) : find_pivots<8>(x, stride, channels, sums[kPivot]);
  int64_t m = 0;
  for (; m + 8 <= rows; m += 8) add_rows<8>(x + m * stride, stride, channels, sums[kPivot], sums[kSum], sums[kSquares]);
  for (; m < rows; m++) add_rows<1>(x + m * stride, stride, channels, sums[kPivot], sums[kSum], sums[kSquares]);
  finish_moments(sums, channels, rows, mean, m2);
}

// The mean and M2 of every channel in a part, each into a row.
template <class A, class Elements>
void moments(const ChannelsLast& p, int64_t part, int64_t, Elements x, A* mean, A* m2) {
  const int64_t channels = p.channels(), count = p.count(part);
  const Elements first = x + p.first_row(part) * channels;
  Rows<A> sums(kMomentRows, p.columns());
  std::fill_n(sums[kSum], 2 * sums.stride(), A(0));
  count < 8 ? find_pivots<1>(first, channels, channels, sums[kPivot])
            : find_pivots<8>(first, channels, channels, sums[kPivot]);
  sums.repeat(1, 0, channels, channels, p.folded());
  p.groups(part, [&](Span s, int64_t rows) {
    rows == 8 ? add_rows<8>(x + s.at, s.n, s.n, sums[kPivot], sums[kSum], sums[kSquares])
              : add_rows<1>(x + s.at, s.n, s.n, sums[kPivot], sums[kSum], sums[kSquares]);
  });
  for (int row : {kSum, kSquares}) sums.fold(row, channels, p.folded());
  finish_moments(sums, channels, count, mean, m2);
}

// The same for a block of channels, in one reading of their planes.
template <class A, class Elements>
void moments(const Contiguous& p, int64_t part, int64_t block, Elements x, A* mean, A* m2) {
  const int64_t first = block * p.channels_each();
  const double count = static_cast<double>(p.count(part));
  Pack<A> sums[kChannels], squares[kChannels];
  A pivots[kChannels];
  for (int64_t c = 0; c < p.channels_in(block); c++) sums[c] = squares[c] = zeros<A>();
  int64_t last = -1;
  p.spans(part, block, [&](Span s) {
    const Elements at = x + s.at;
    const int64_t c = s.c - first;
    // The first span of a channel: the channels of an image come one after the other.
    if (c > last) {
      const First pilots{std::min(s.n, Pack<A>::lanes - 1)};
      pivots[c] = static_cast<A>(total(at.load(0, pilots)) / static_cast<double>(pilots.n));
      last = c;
    }
    const Pack<A> pivot = all(pivots[c]);
    Deviations<A> even{sums[c], squares[c]}, odd{zeros<A>(), zeros<A>()};
    unrolled<A>(s.n, [&](int64_t i, auto n, int u) INLINED {
      (u % 2 == 0 ? even : odd).add(only(n, at.load(i, n) - pivot));
    });
    sums[c] = even.sum + odd.sum;
    squares[c] = even.squares + odd.squares;
  });
  for (int64_t c = 0; c < p.channels_in(block); c++) {
    const double shift = total(sums[c]) / count;
    mean[first + c] = static_cast<A>(pivots[c] + shift);
    m2[first + c] = static_cast<A>(total(squares[c]) - shift * shift * count);
  }
}

// Mean and M2 of a channel from those of its columns, of which each has ``count`` values.
template <class A>
void merge_columns(A* means, A* m2s, int64_t columns, int64_t count, double* mean, double* m2) {
  const Pack<A> pivot = all(means[0]);
  Deviations<A> found{zeros<A>(), zeros<A>()};
  Pack<A> inside = zeros<A>();
  walk<A>(columns, [&](int64_t i, auto n) INLINED {
    found.add(only(n, Typed<A>(means).load(i, n) - pivot));
    inside = inside + Typed<A>(m2s).load(i, n);
  });
  const double shift = total(found.sum) / static_cast<double>(columns);
  *mean = means[0] + shift;
  const double between = total(found.squares) - shift * shift * static_cast<double>(columns);
  *m2 = total(inside) + static_cast<double>(count) * between;
  // Below nothing by a rounding alone.
  if (*m2 < 0) *m2 = 0;
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
      // Below nothing by a rounding alone.
      m2[c] += (m2s[c] < 0 ? 0 : m2s[c]) + values * deviation * deviation;
    }
  }
}

}  // namespace resfused
