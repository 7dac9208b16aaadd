// Pack in AVX2 with FMA and F16C: two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace resfused {

template <>
struct Pack<float> {
  static constexpr int64_t lanes = 16;
  struct Lanes {
    __m256 lo, hi;
  };
  __m256 lo, hi;
};

template <>
struct Pack<double> {
  static constexpr int64_t lanes = 8;
  struct Lanes {
    __m256d lo, hi;
  };
  __m256d lo, hi;
};

INLINE Pack<float> all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE Pack<double> all(double value) { return {_mm256_set1_pd(value), _mm256_set1_pd(value)}; }
INLINE Pack<float> operator+(Pack<float> a, Pack<float> b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
INLINE Pack<double> operator+(Pack<double> a, Pack<double> b) {
  return {_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)};
}
INLINE Pack<float> operator-(Pack<float> a, Pack<float> b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
INLINE Pack<double> operator-(Pack<double> a, Pack<double> b) {
  return {_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)};
}
INLINE Pack<float> operator*(Pack<float> a, Pack<float> b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
INLINE Pack<double> operator*(Pack<double> a, Pack<double> b) {
  return {_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)};
}
INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) {
  return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}

INLINE Pack<float> lesser(Pack<float> bound, Pack<float> a) {
  return {_mm256_min_ps(bound.lo, a.lo), _mm256_min_ps(bound.hi, a.hi)};
}
INLINE Pack<double> lesser(Pack<double> bound, Pack<double> a) {
  return {_mm256_min_pd(bound.lo, a.lo), _mm256_min_pd(bound.hi, a.hi)};
}
INLINE Pack<float> greater(Pack<float> bound, Pack<float> a) {
  return {_mm256_max_ps(bound.lo, a.lo), _mm256_max_ps(bound.hi, a.hi)};
}
INLINE Pack<double> greater(Pack<double> bound, Pack<double> a) {
  return {_mm256_max_pd(bound.lo, a.lo), _mm256_max_pd(bound.hi, a.hi)};
}
INLINE Pack<float> magnitude(Pack<float> a) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
INLINE Pack<double> magnitude(Pack<double> a) {
  const __m256d sign = _mm256_set1_pd(-0.);
  return {_mm256_andnot_pd(sign, a.lo), _mm256_andnot_pd(sign, a.hi)};
}
INLINE Pack<float> reciprocal(Pack<float> a) {
  const __m256 one = _mm256_set1_ps(1);
  return {_mm256_div_ps(one, a.lo), _mm256_div_ps(one, a.hi)};
}
INLINE Pack<double> reciprocal(Pack<double> a) {
  const __m256d one = _mm256_set1_pd(1);
  return {_mm256_div_pd(one, a.lo), _mm256_div_pd(one, a.hi)};
}
// 2^n in two factors, of which none is subnormal.
INLINE __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
INLINE __m256 scaled(__m256 a, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
INLINE Pack<float> scaled(Pack<float> a, Pack<float> n) { return {scaled(a.lo, n.lo), scaled(a.hi, n.hi)}; }

INLINE Pack<float>::Lanes passes(Pack<float> z) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_cmp_ps(z.lo, zero, _CMP_NLE_UQ), _mm256_cmp_ps(z.hi, zero, _CMP_NLE_UQ)};
}
INLINE Pack<double>::Lanes passes(Pack<double> z) {
  const __m256d zero = _mm256_setzero_pd();
  return {_mm256_cmp_pd(z.lo, zero, _CMP_NLE_UQ), _mm256_cmp_pd(z.hi, zero, _CMP_NLE_UQ)};
}
INLINE Pack<float>::Lanes positive(Pack<float> z) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_cmp_ps(z.lo, zero, _CMP_GT_OQ), _mm256_cmp_ps(z.hi, zero, _CMP_GT_OQ)};
}
INLINE Pack<double>::Lanes positive(Pack<double> z) {
  const __m256d zero = _mm256_setzero_pd();
  return {_mm256_cmp_pd(z.lo, zero, _CMP_GT_OQ), _mm256_cmp_pd(z.hi, zero, _CMP_GT_OQ)};
}
INLINE Pack<float>::Lanes both(Pack<float>::Lanes lanes, Pack<float>::Lanes others) {
  return {_mm256_and_ps(lanes.lo, others.lo), _mm256_and_ps(lanes.hi, others.hi)};
}
INLINE Pack<double>::Lanes both(Pack<double>::Lanes lanes, Pack<double>::Lanes others) {
  return {_mm256_and_pd(lanes.lo, others.lo), _mm256_and_pd(lanes.hi, others.hi)};
}
INLINE Pack<float> select(Pack<float>::Lanes lanes, Pack<float> a, Pack<float> b) {
  return {_mm256_blendv_ps(b.lo, a.lo, lanes.lo), _mm256_blendv_ps(b.hi, a.hi, lanes.hi)};
}
INLINE Pack<double> select(Pack<double>::Lanes lanes, Pack<double> a, Pack<double> b) {
  return {_mm256_blendv_pd(b.lo, a.lo, lanes.lo), _mm256_blendv_pd(b.hi, a.hi, lanes.hi)};
}
INLINE Pack<float> keep(Pack<float>::Lanes lanes, Pack<float> a) {
  return {_mm256_and_ps(lanes.lo, a.lo), _mm256_and_ps(lanes.hi, a.hi)};
}
INLINE Pack<double> keep(Pack<double>::Lanes lanes, Pack<double> a) {
  return {_mm256_and_pd(lanes.lo, a.lo), _mm256_and_pd(lanes.hi, a.hi)};
}

template <class A>
INLINE uint32_t bits(typename Pack<A>::Lanes lanes);
template <>
INLINE uint32_t bits<float>(Pack<float>::Lanes lanes) {
  return static_cast<uint32_t>(_mm256_movemask_ps(lanes.lo) | _mm256_movemask_ps(lanes.hi) << 8);
}
template <>
INLINE uint32_t bits<double>(Pack<double>::Lanes lanes) {
  return static_cast<uint32_t>(_mm256_movemask_pd(lanes.lo) | _mm256_movemask_pd(lanes.hi) << 4);
}
template <class A>
INLINE typename Pack<A>::Lanes lanes_of(uint32_t bits);
template <>
INLINE Pack<float>::Lanes lanes_of<float>(uint32_t bits) {
  const __m256i every = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(every, low), low)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(every, high), high))};
}
template <>
INLINE Pack<double>::Lanes lanes_of<double>(uint32_t bits) {
  const __m256i every = _mm256_set1_epi64x(bits);
  const __m256i low = _mm256_setr_epi64x(1, 2, 4, 8), high = _mm256_slli_epi64(low, 4);
  return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(every, low), low)),
          _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(every, high), high))};
}

INLINE Pack<float> load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE Pack<double> load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
INLINE void store(float* p, Pack<float> a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
INLINE void store(double* p, Pack<double> a) {
  _mm256_storeu_pd(p, a.lo);
  _mm256_storeu_pd(p + 4, a.hi);
}
INLINE void stream(float* p, Pack<float> a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
INLINE void stream(double* p, Pack<double> a) {
  _mm256_stream_pd(p, a.lo);
  _mm256_stream_pd(p + 4, a.hi);
}

// Of the first n lanes.
template <class A>
INLINE Pack<A> load_first(const A* p, int64_t n) {
  const auto lanes = lanes_of<A>((1u << n) - 1);
  if constexpr (sizeof(A) == 4) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(lanes.lo)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(lanes.hi))};
  } else {
    return {_mm256_maskload_pd(p, _mm256_castpd_si256(lanes.lo)), _mm256_maskload_pd(p + 4, _mm256_castpd_si256(lanes.hi))};
  }
}
INLINE Pack<float> load(const float* p, int64_t n) { return load_first(p, n); }
INLINE Pack<double> load(const double* p, int64_t n) { return load_first(p, n); }
INLINE void store(float* p, Pack<float> a, int64_t n) {
  const auto lanes = lanes_of<float>((1u << n) - 1);
  _mm256_maskstore_ps(p, _mm256_castps_si256(lanes.lo), a.lo);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(lanes.hi), a.hi);
}
INLINE void store(double* p, Pack<double> a, int64_t n) {
  const auto lanes = lanes_of<double>((1u << n) - 1);
  _mm256_maskstore_pd(p, _mm256_castpd_si256(lanes.lo), a.lo);
  _mm256_maskstore_pd(p + 4, _mm256_castpd_si256(lanes.hi), a.hi);
}

// Sixteen values of two bytes.
using Halves = __m256i;
INLINE Halves load_halves(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store_halves(void* p, Halves a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
INLINE void stream_halves(void* p, Halves a) { _mm256_stream_si256(static_cast<__m256i*>(p), a); }
INLINE Halves load_halves(const void* p, int64_t n) {
  alignas(32) uint16_t values[16] = {};
  std::memcpy(values, p, static_cast<size_t>(2 * n));
  return load_halves(values);
}
INLINE void store_halves(void* p, Halves a, int64_t n) {
  alignas(32) uint16_t values[16];
  store_halves(values, a);
  std::memcpy(p, values, static_cast<size_t>(2 * n));
}

INLINE Pack<float> from_bfloat16(Halves a) {
  // Unpacking goes by 128 bits: the quarters change places first.
  const __m256i zero = _mm256_setzero_si256(), quarters = _mm256_permute4x64_epi64(a, 0xd8);
  return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, quarters)),
          _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, quarters))};
}
INLINE __m256i rounded_to_bfloat16(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
INLINE Halves to_bfloat16(Pack<float> a) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded_to_bfloat16(a.lo), rounded_to_bfloat16(a.hi)), 0xd8);
}
INLINE Pack<float> from_float16(Halves a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}
INLINE Halves to_float16(Pack<float> a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
}

INLINE void fence() { _mm_sfence(); }

}  // namespace resfused
