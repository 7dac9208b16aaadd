// The smooth activations on packs, made of e^-a and, for gelu, of the normal distribution. tanh(u) is 2 sigmoid(2u) - 1.
#pragma once

#include <cmath>
#include <cstddef>

#include "../call.h"
#include "../packs/pack.h"

namespace resfused {
namespace {

template <class Function>
Pack<double> each_lane(Pack<double> a, Function function) {
  double values[Pack<double>::lanes];
  store(values, a);
  for (double& value : values) value = function(value);
  return load(values);
}

// c[0] + c[1] a + ..., by Horner's rule.
template <size_t N>
INLINE Pack<float> polynomial(const float (&c)[N], Pack<float> a) {
  Pack<float> sum = all(c[N - 1]);
  for (size_t i = N - 1; i-- > 0;) sum = fma(sum, a, all(c[i]));
  return sum;
}

// e^-a for a >= 0, 0 from where it is less than any float. The reduction, a = n ln 2 - r with ln 2 in two parts of which
// the first times n is exact, and e^r = 1 + r + r² p(r) are Cephes' expf (S. Moshier, netlib.org/cephes).
INLINE Pack<float> decay(Pack<float> a) {
  constexpr float kPolynomial[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                   8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  a = lesser(all(105.f), a);
  // Beside 1.5 * 2^23 there is no room for a fraction.
  const Pack<float> shift = all(12582912.f), n = (a * all(1.44269504f) + shift) - shift;
  const Pack<float> r = fma(n, all(-2.12194440e-4f), fma(n, all(0.693359375f), zeros<float>() - a));
  const Pack<float> power = fma(polynomial(kPolynomial, r), r * r, r) + all(1.f);
  return scaled(power, zeros<float>() - n);
}
Pack<double> decay(Pack<double> a) {
  return each_lane(a, [](double v) { return std::exp(-v); });
}

// sigmoid(z) and 1 - sigmoid(z), neither by a difference: both have all their digits.
template <class A>
struct Logistic {
  Pack<A> value, rest;
};
template <class A>
INLINE Logistic<A> logistic(Pack<A> z) {
  const Pack<A> e = decay(magnitude(z)), large = reciprocal(e + all(A(1))), small = e * large;
  const auto on = positive(z);
  return {select(on, large, small), select(on, small, large)};
}

// The normal distribution's Φ(z) and density.
template <class A>
struct Normal {
  Pack<A> below, density;
};
constexpr double kDensity = 0.3989422804014327;  // 1 / √(2π)

// Φ(-a) = density(a) r p((a - 3) r) with r = 1 / (a + 3): the variable in which M. Shepherd and J. Laframboise expand
// e^(x²) erfc(x) ("Chebyshev approximation of (1 + 2x) exp(x²) erfc x", Mathematics of Computation 36, 1981). p is a
// minimax fit over 0 <= a <= 15 of our own, to 2.1e-8 of the value.
INLINE Normal<float> normal(Pack<float> z) {
  constexpr float kPolynomial[] = {0.729083717f, -0.50933218f, 0.230017632f, -0.0472580194f,
                                   -0.0104615185f, 0.00693685515f, 0.00101351016f, -0.000947222114f,
                                   -0.000199391259f, 5.45127514e-05f};
  const Pack<float> a = lesser(all(15.f), magnitude(z)), power = decay(a * all(0.5f) * a);
  const Pack<float> r = reciprocal(a + all(3.f));
  const Pack<float> tail = power * r * polynomial(kPolynomial, (a - all(3.f)) * r);
  return {select(positive(z), all(1.f) - tail, tail), power * all(static_cast<float>(kDensity))};
}
Normal<double> normal(Pack<double> z) {
  return {each_lane(z, [](double v) { return 0.5 * std::erfc(-v * 0.7071067811865476); }),
          each_lane(z, [](double v) { return kDensity * std::exp(-0.5 * v * v); })};
}

// gelu's tanh form is z sigmoid(2u), u = √(2/π) (z + 0.044715 z³). A square that is 1e9 or more makes no difference, and
// where it were infinite the derivative, 0 times it, would be no number.
constexpr double kTwice = 1.5957691216057308, kCubic = 0.044715;  // 2 √(2/π)
template <class A>
INLINE Pack<A> of_square(Pack<A> z, double cubic) {
  return fma(lesser(all(A(1e9)), z * z), all(A(kTwice * cubic)), all(A(kTwice)));
}

template <class A>
INLINE Pack<A> smooth_value(int64_t name, Pack<A> z) {
  switch (name) {
    case kSigmoid: return logistic(z).value;
    case kSilu: return z * logistic(z).value;
    case kGeluTanh: return z * logistic(z * of_square(z, kCubic)).value;
    default: return z * normal(z).below;
  }
}

template <class A>
INLINE Pack<A> smooth_slope(int64_t name, Pack<A> z) {
  switch (name) {
    case kSigmoid: {
      const Logistic<A> s = logistic(z);
      return s.value * s.rest;
    }
    case kSilu: {
      const Logistic<A> s = logistic(z);
      return s.value * fma(z, s.rest, all(A(1)));
    }
    case kGeluTanh: {
      const Logistic<A> s = logistic(z * of_square(z, kCubic));
      return fma(s.value * s.rest * z, of_square(z, 3 * kCubic), s.value);
    }
    default: {
      const Normal<A> of = normal(z);
      return fma(z, of.density, of.below);
    }
  }
}

// The same for a name that is not known when compiling: once, not in every loop.
template <class A>
__attribute__((noinline)) Pack<A> called_value(int64_t name, Pack<A> z) {
  return smooth_value(name, z);
}
template <class A>
__attribute__((noinline)) Pack<A> called_slope(int64_t name, Pack<A> z) {
  return smooth_slope(name, z);
}

}  // namespace
}  // namespace resfused
