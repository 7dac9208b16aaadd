// Per-channel vectors: those of the caller, of any dtype, and the rows that the loops read.
#pragma once

#include <cmath>
#include <cstdint>
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

 private:
  int64_t stride_;
  std::unique_ptr<A[]> memory_;
  A* first_;
};

// The rows of one norm: z = scale * (x - mean) + shift, and in the backward dx = scale * dz + slope * (x - mean) +
// offset. A second norm has as many after them.
enum Row : int { kMean, kScale, kShift, kSlope, kOffset, kRowsOfNorm };

// A norm's rows as packs.
template <class A>
struct NormPacks {
  Pack<A> mean, scale, shift, slope, offset;
};

// Those of a span that goes over channels, at element i of it.
template <class A>
class ByElement {
 public:
  ByElement(const Rows<A>& r, int64_t) : rows_(r[0]), stride_(r.stride()) {}
  NormPacks<A> own(int64_t i) const { return of(rows_ + i); }
  NormPacks<A> second(int64_t i) const { return of(rows_ + kRowsOfNorm * stride_ + i); }

 private:
  NormPacks<A> of(const A* at) const {
    return {load(at + kMean * stride_), load(at + kScale * stride_), load(at + kShift * stride_),
            load(at + kSlope * stride_), load(at + kOffset * stride_)};
  }
  const A* rows_;
  int64_t stride_;
};

// Those of a span within channel c.
template <class A>
class OfChannel {
 public:
  OfChannel(const Rows<A>& r, int64_t c) : own_(of(r, 0, c)), second_(of(r, kRowsOfNorm, c)) {}
  NormPacks<A> own(int64_t) const { return own_; }
  NormPacks<A> second(int64_t) const { return second_; }

 private:
  static NormPacks<A> of(const Rows<A>& r, int row, int64_t c) {
    return {all(r[row + kMean][c]), all(r[row + kScale][c]), all(r[row + kShift][c]), all(r[row + kSlope][c]),
            all(r[row + kOffset][c])};
  }
  NormPacks<A> own_, second_;
};

template <class A, class Partition>
struct Access;
template <class A>
struct Access<A, ChannelsLast> {
  using Type = ByElement<A>;
};
template <class A>
struct Access<A, Contiguous> {
  using Type = OfChannel<A>;
};

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

template <class A>
inline Pack<A> affine(Pack<A> centred, const NormPacks<A>& n) {
  return fma(centred, n.scale, n.shift);
}

template <class A>
inline uint32_t load_bits(const uint8_t* mask, int64_t i, Whole) {
  if constexpr (Pack<A>::lanes == 8) return mask[i / 8];
  return mask[i / 8] | static_cast<uint32_t>(mask[i / 8 + 1]) << 8;
}
template <class A>
inline uint32_t load_bits(const uint8_t* mask, int64_t i, First f) {
  return f.n > 8 ? load_bits<A>(mask, i, Whole{}) : mask[i / 8];
}
template <class A>
inline void store_bits(uint8_t* mask, int64_t i, Whole, uint32_t bits) {
  mask[i / 8] = static_cast<uint8_t>(bits);
  if constexpr (Pack<A>::lanes > 8) mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
}
template <class A>
inline void store_bits(uint8_t* mask, int64_t i, First f, uint32_t bits) {
  bits &= (1u << f.n) - 1;
  mask[i / 8] = static_cast<uint8_t>(bits);
  if (f.n > 8) mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
}

}  // namespace resfused
