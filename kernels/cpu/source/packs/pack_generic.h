// Pack in registers of 16 bytes, which every 64-bit processor has: four of them.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace resfused {

template <class A>
struct Registers;
template <>
struct Registers<float> {
  typedef float Values __attribute__((vector_size(16)));
  typedef int32_t Lanes __attribute__((vector_size(16)));
};
template <>
struct Registers<double> {
  typedef double Values __attribute__((vector_size(16)));
  typedef int64_t Lanes __attribute__((vector_size(16)));
};

template <class A>
struct Pack {
  static constexpr int64_t lanes = 64 / sizeof(A);
  using Values = typename Registers<A>::Values;
  struct Lanes {
    typename Registers<A>::Lanes r[4];
  };
  Values r[4];
};

template <class A, class Function>
INLINE Pack<A> each(Function function) {
  return {{function(0), function(1), function(2), function(3)}};
}

template <class A>
INLINE Pack<A> splat(A value) {
  const typename Pack<A>::Values v = value - typename Pack<A>::Values{};
  return {{v, v, v, v}};
}
INLINE Pack<float> all(float value) { return splat(value); }
INLINE Pack<double> all(double value) { return splat(value); }
template <class A>
INLINE Pack<A> operator+(Pack<A> a, Pack<A> b) {
  return each<A>([&](int i) { return a.r[i] + b.r[i]; });
}
template <class A>
INLINE Pack<A> operator-(Pack<A> a, Pack<A> b) {
  return each<A>([&](int i) { return a.r[i] - b.r[i]; });
}
template <class A>
INLINE Pack<A> operator*(Pack<A> a, Pack<A> b) {
  return each<A>([&](int i) { return a.r[i] * b.r[i]; });
}
// Fused where the processor does it; elsewhere always in two steps, so that a sign is the same wherever it is computed.
template <class A>
INLINE Pack<A> fma(Pack<A> a, Pack<A> b, Pack<A> c) {
  return each<A>([&](int i) {
#ifdef __aarch64__
    typename Pack<A>::Values sum;
    for (size_t j = 0; j < 16 / sizeof(A); j++) {
      if constexpr (sizeof(A) == 4) {
        sum[j] = __builtin_fmaf(a.r[i][j], b.r[i][j], c.r[i][j]);
      } else {
        sum[j] = __builtin_fma(a.r[i][j], b.r[i][j], c.r[i][j]);
      }
    }
    return sum;
#else
    return a.r[i] * b.r[i] + c.r[i];
#endif
  });
}

template <class A>
INLINE typename Pack<A>::Lanes passes(Pack<A> z) {
  const typename Pack<A>::Values zero = {};
  return {{~(z.r[0] <= zero), ~(z.r[1] <= zero), ~(z.r[2] <= zero), ~(z.r[3] <= zero)}};
}
template <class A>
INLINE typename Pack<A>::Lanes positive(Pack<A> z) {
  const typename Pack<A>::Values zero = {};
  return {{z.r[0] > zero, z.r[1] > zero, z.r[2] > zero, z.r[3] > zero}};
}
template <class Lanes>
INLINE Lanes both(Lanes lanes, Lanes others) {
  for (int i = 0; i < 4; i++) lanes.r[i] &= others.r[i];
  return lanes;
}
template <class A>
INLINE Pack<A> keep(typename Pack<A>::Lanes lanes, Pack<A> a) {
  using Values = typename Pack<A>::Values;
  using Integers = typename Registers<A>::Lanes;
  return each<A>([&](int i) { return (Values)((Integers)a.r[i] & lanes.r[i]); });
}
template <class A>
INLINE Pack<A> select(typename Pack<A>::Lanes lanes, Pack<A> a, Pack<A> b) {
  return each<A>([&](int i) { return lanes.r[i] ? a.r[i] : b.r[i]; });
}
template <class A>
INLINE Pack<A> lesser(Pack<A> bound, Pack<A> a) {
  return each<A>([&](int i) { return bound.r[i] < a.r[i] ? bound.r[i] : a.r[i]; });
}
template <class A>
INLINE Pack<A> greater(Pack<A> bound, Pack<A> a) {
  return each<A>([&](int i) { return bound.r[i] > a.r[i] ? bound.r[i] : a.r[i]; });
}
template <class A>
INLINE Pack<A> magnitude(Pack<A> a) {
  return each<A>([&](int i) { return a.r[i] < 0 ? -a.r[i] : a.r[i]; });
}
template <class A>
INLINE Pack<A> reciprocal(Pack<A> a) {
  return each<A>([&](int i) { return 1 / a.r[i]; });
}
// 2^n in two factors, of which none is subnormal.
INLINE Pack<float> scaled(Pack<float> a, Pack<float> n) {
  using Values = Pack<float>::Values;
  return each<float>([&](int i) {
    // Of NaN, which stays one, no integer can be made.
    const auto whole = __builtin_convertvector(n.r[i] < 0 ? n.r[i] : Values{}, Registers<float>::Lanes);
    const auto half = whole >> 1;
    return a.r[i] * (Values)((half + 127) << 23) * (Values)((whole - half + 127) << 23);
  });
}
template <class A>
INLINE uint32_t bits(typename Pack<A>::Lanes lanes) {
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) {
#ifdef __SSE2__
    if constexpr (sizeof(A) == 4) {
      found |= static_cast<uint32_t>(_mm_movemask_ps((__m128)lanes.r[i])) << 4 * i;
    } else {
      found |= static_cast<uint32_t>(_mm_movemask_pd((__m128d)lanes.r[i])) << 2 * i;
    }
#else
    constexpr int each = 16 / sizeof(A);
    for (int j = 0; j < each; j++) found |= static_cast<uint32_t>(lanes.r[i][j] & 1) << (each * i + j);
#endif
  }
  return found;
}
template <class A>
INLINE typename Pack<A>::Lanes lanes_of(uint32_t bits) {
  typename Pack<A>::Lanes lanes;
  constexpr int each = 16 / sizeof(A);
  for (int i = 0; i < 4; i++) {
    typename Registers<A>::Lanes weights;
    for (int j = 0; j < each; j++) weights[j] = 1 << (each * i + j);
    const auto every = static_cast<int32_t>(bits) - typename Registers<A>::Lanes{};
    lanes.r[i] = (every & weights) == weights;
  }
  return lanes;
}

template <class A>
INLINE Pack<A> load_any(const A* p) {
  Pack<A> a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
template <class A>
INLINE Pack<A> load_any(const A* p, int64_t n) {
  Pack<A> a = {};
  std::memcpy(&a, p, static_cast<size_t>(n) * sizeof(A));
  return a;
}
INLINE Pack<float> load(const float* p) { return load_any(p); }
INLINE Pack<double> load(const double* p) { return load_any(p); }
INLINE Pack<float> load(const float* p, int64_t n) { return load_any(p, n); }
INLINE Pack<double> load(const double* p, int64_t n) { return load_any(p, n); }
template <class A>
INLINE void store(A* p, Pack<A> a) {
  std::memcpy(p, &a, sizeof a);
}
template <class A>
INLINE void store(A* p, Pack<A> a, int64_t n) {
  std::memcpy(p, &a, static_cast<size_t>(n) * sizeof(A));
}
template <class A>
INLINE void stream(A* p, Pack<A> a) {
#ifdef __SSE2__
  for (int i = 0; i < 4; i++) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, (__m128i)a.r[i]);
#else
  store(p, a);
#endif
}

// Sixteen values of two bytes.
struct Halves {
  uint16_t values[16];
};
INLINE Halves load_halves(const void* p) {
  Halves a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
INLINE Halves load_halves(const void* p, int64_t n) {
  Halves a = {};
  std::memcpy(&a, p, static_cast<size_t>(2 * n));
  return a;
}
INLINE void store_halves(void* p, Halves a) { std::memcpy(p, &a, sizeof a); }
INLINE void store_halves(void* p, Halves a, int64_t n) { std::memcpy(p, &a, static_cast<size_t>(2 * n)); }
INLINE void stream_halves(void* p, Halves a) { store_halves(p, a); }

template <class To, class From>
INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

INLINE Pack<float> from_bfloat16(Halves a) {
  uint32_t u[16];
  for (int i = 0; i < 16; i++) u[i] = static_cast<uint32_t>(a.values[i]) << 16;
  return as<Pack<float>>(u);
}
INLINE Halves to_bfloat16(Pack<float> a) {
  uint32_t u[16];
  std::memcpy(u, &a, sizeof u);
  Halves rounded;
  for (int i = 0; i < 16; i++) {
    const bool nan = (u[i] & 0x7fffffff) > 0x7f800000;
    rounded.values[i] = static_cast<uint16_t>(nan ? 0x7fc0 : (u[i] + 0x7fff + (u[i] >> 16 & 1)) >> 16);
  }
  return rounded;
}

// Half precision by its bits: the multiplication by 2^112 moves the exponent, of subnormals too.
INLINE float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  uint32_t u = as<uint32_t>(as<float>(magnitude << 13) * as<float>(0x77800000u));
  if (magnitude >= 0x7c00) u |= 0x7f800000u;
  return as<float>(u | sign);
}
INLINE uint16_t to_float16(float value) {
  const uint32_t u = as<uint32_t>(value), sign = u >> 16 & 0x8000u;
  uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  // From 65520 on, half way to what would come next, the nearest is infinity.
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // Below 2^-14 the addition of 0.5 leaves the subnormal's digits, rounded, in the lowest bits.
  if (magnitude < 0x38800000u) {
    return static_cast<uint16_t>(sign | (as<uint32_t>(as<float>(magnitude) + 0.5f) - 0x3f000000u));
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1) - 0x38000000u;
  return static_cast<uint16_t>(sign | magnitude >> 13);
}
INLINE Pack<float> from_float16(Halves a) {
  float values[16];
  for (int i = 0; i < 16; i++) values[i] = from_float16(a.values[i]);
  return as<Pack<float>>(values);
}
INLINE Halves to_float16(Pack<float> a) {
  float values[16];
  std::memcpy(values, &a, sizeof values);
  Halves rounded;
  for (int i = 0; i < 16; i++) rounded.values[i] = to_float16(values[i]);
  return rounded;
}

INLINE void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace resfused
