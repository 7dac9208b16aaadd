// A pack: elements of float or double, eight times a power of two, that move together, in the registers of the
// instruction set compiled for.
//
// all, + - *, fma, reciprocal, magnitude; lesser(bound, a) and greater(bound, a), NaN where a is; scaled(a, n), a 2^n of
// float with a whole n from -252 to 0. load and store of a whole pack or its first n lanes, stream (a store past the
// caches, aligned). Lanes are chosen by passes(z), z > 0 or NaN, and positive(z), not NaN; both(lanes, others);
// keep(lanes, a) is a there and 0 elsewhere, select(lanes, a, b) b; bits and lanes_of turn lanes into the bits of an
// integer and back, the first lane the lowest.
#pragma once

#include <cstdint>

// What a loop does to a pack is inlined before anything else, or its packs would travel through memory.
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))

namespace resfused {
template <class A>
struct Pack;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "pack_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "pack_avx2.h"
#else
#include "pack_generic.h"
#endif

namespace resfused {

template <class A>
INLINE Pack<A> zeros() {
  return all(A(0));
}

// The sum of all lanes, pairwise.
template <class A>
inline double total(Pack<A> a) {
  A values[Pack<A>::lanes];
  store(values, a);
  double sums[Pack<A>::lanes];
  for (int64_t i = 0; i < Pack<A>::lanes; i++) sums[i] = values[i];
  for (int64_t n = Pack<A>::lanes / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; i++) sums[i] += sums[i + n];
  }
  return sums[0];
}

// How much of a pack there is: all of it, or its first n lanes.
struct Whole {};
struct First {
  int64_t n;
};

// Calls step(at, Whole) for every pack of n elements, then step(at, First) for what is left.
template <class A, class Step>
INLINE void walk(int64_t n, Step step) {
  constexpr int64_t lanes = Pack<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step(i, Whole{});
  if (i < n) step(i, First{n - i});
}

// The same four packs at a time, with the number of each as a third argument: four sums instead of a chain.
template <class A, class Step>
INLINE void unrolled(int64_t n, Step step) {
  constexpr int64_t lanes = Pack<A>::lanes;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    step(i, Whole{}, 0);
    step(i + lanes, Whole{}, 1);
    step(i + 2 * lanes, Whole{}, 2);
    step(i + 3 * lanes, Whole{}, 3);
  }
  for (; i + lanes <= n; i += lanes) step(i, Whole{}, 0);
  if (i < n) step(i, First{n - i}, 1);
}

// 0 in lanes that are not there.
template <class A>
INLINE Pack<A> only(Whole, Pack<A> a) {
  return a;
}
template <class A>
INLINE Pack<A> only(First f, Pack<A> a) {
  return keep(lanes_of<A>((1u << f.n) - 1), a);
}

}  // namespace resfused
