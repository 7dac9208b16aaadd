// Per-channel vectors: those of the caller, of any dtype, and the rows that the loops read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "call.h"
#include "partition.h"
#include "storage.h"

namespace resfused {

// Element c of a vector in the type of the arithmetic.
template <class A>
inline A read(const Tensor& t, int64_t c) {
  A values[Pack<A>::lanes];
  store(values, AnyTyped<A>(t).load(c, First{1}));
  return values[0];
}

template <class A>
inline void write(const Tensor& t, int64_t c, double value) {
  AnyTyped<A>(t).store(c, First{1}, all(static_cast<A>(value)), false);
}

// Rows of one value a channel, each padded to whole packs and aligned.
template <class A>
class Rows {
 public:
  Rows(int64_t rows, int64_t channels)
      : stride_(round_up(channels, 64)), memory_(new A[rows * stride_ + 64]), first_(memory_.get()) {
    const auto address = reinterpret_cast<uintptr_t>(first_);
    first_ += (64 - address % 64) % 64 / sizeof(A);
  }
  A* operator[](int64_t row) { return first_ + row * stride_; }
  const A* operator[](int64_t row) const { return first_ + row * stride_; }
  int64_t stride() const { return stride_; }
  // Elements [first, first + n) of every row again, ``times`` in all, each ``apart`` elements after the last.
  void repeat(int64_t rows, int64_t first, int64_t n, int64_t apart, int64_t times) {
    for (int64_t row = 0; row < rows; row++) {
      A* at = (*this)[row] + first;
      for (int64_t i = 1; i < times; i++) std::copy_n(at, n, at + i * apart);
    }
  }
  // The sum of a row and its repetitions, in the place of the first.
  void fold(int64_t row, int64_t apart, int64_t times) {
    A* at = (*this)[row];
    for (int64_t i = 1; i < times; i++) {
      walk<A>(apart, [&](int64_t c, auto n) INLINED {
        const Typed<A> here(at), there(at + i * apart);
        here.store(c, n, here.load(c, n) + there.load(c, n), false);
      });
    }
  }

 private:
  int64_t stride_;
  std::unique_ptr<A[]> memory_;
  A* first_;
};

// The rows of one norm: z = scale * (x - mean) + shift, and in the backward dx = scale * dz + slope * (x - mean) +
// offset. A second norm has as many after them.
enum Row : int { kMean, kScale, kShift, kSlope, kOffset, kRowsOfNorm };

// The rows of both norms as packs: of a span over channels at element i of it, of one within channel c always the same.
// Read again for every pack: a broadcast costs no more than a load, and registers are for sums.
template <class A, class Partition>
class NormPacks {
 public:
  NormPacks(const Rows<A>& rows, int64_t c) : at_(rows[0] + c), stride_(rows.stride()) {}
  INLINE Pack<A> get(int norm, Row row, int64_t i) const {
    const A* at = at_ + (norm * kRowsOfNorm + row) * stride_;
    if constexpr (Partition::kOverChannels) return load(at + i);
    return all(*at);
  }
  // weight x̂ + bias.
  INLINE Pack<A> affine(int norm, Pack<A> centred, int64_t i) const {
    return fma(centred, get(norm, kScale, i), get(norm, kShift, i));
  }

 private:
  const A* at_;
  int64_t stride_;
};

template <class A>
inline double sum_of(A* values, int64_t n) {
  Pack<A> sum = zeros<A>();
  walk<A>(n, [&](int64_t i, auto some) INLINED { sum = sum + Typed<A>(values).load(i, some); });
  return total(sum);
}

// A norm's first rows at channel c, from its mean and 1 / std. The same operations in the forward and the backward:
// the sign of z is the same in both.
template <class A>
inline void fill(Rows<A>& rows, int norm, int64_t c, A mean, A rstd, const Norm& n) {
  const int row = norm * kRowsOfNorm;
  rows[row + kMean][c] = mean;
  rows[row + kScale][c] = n.weight ? rstd * read<A>(n.weight, c) : rstd;
  rows[row + kShift][c] = n.bias ? read<A>(n.bias, c) : A(0);
}

template <class A>
inline A rstd_of(double variance, double eps) {
  return static_cast<A>(1 / std::sqrt(variance + eps));
}

// The bits of a pack's lanes at element i of a mask, whose bytes are those of whole eights.
template <class A>
INLINE uint32_t load_bits(const uint8_t* mask, int64_t i, Whole) {
  uint32_t bits = 0;
  std::memcpy(&bits, mask + i / 8, Pack<A>::lanes / 8);
  return bits;
}
template <class A>
INLINE uint32_t load_bits(const uint8_t* mask, int64_t i, First f) {
  uint32_t bits = 0;
  for (int64_t j = 0; 8 * j < f.n; j++) bits |= static_cast<uint32_t>(mask[i / 8 + j]) << 8 * j;
  return bits;
}
template <class A>
INLINE void store_bits(uint8_t* mask, int64_t i, Whole, uint32_t bits) {
  std::memcpy(mask + i / 8, &bits, Pack<A>::lanes / 8);
}
template <class A>
INLINE void store_bits(uint8_t* mask, int64_t i, First f, uint32_t bits) {
  bits &= (1u << f.n) - 1;
  for (int64_t j = 0; 8 * j < f.n; j++) mask[i / 8 + j] = static_cast<uint8_t>(bits >> 8 * j);
}

}  // namespace resfused
