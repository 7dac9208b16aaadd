// Pack in AVX-512: two registers of float, one of double. Thirty-two values of two bytes fill a line of the cache, and
// one permutation widens or narrows sixteen of them in their order.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace resfused {

template <>
struct Pack<float> {
  static constexpr int64_t lanes = 32;
  struct Lanes {
    __mmask16 lo, hi;
  };
  __m512 lo, hi;
};

template <>
struct Pack<double> {
  static constexpr int64_t lanes = 8;
  using Lanes = __mmask8;
  __m512d v;
};

INLINE Pack<float> all(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }
INLINE Pack<double> all(double value) { return {_mm512_set1_pd(value)}; }
INLINE Pack<float> operator+(Pack<float> a, Pack<float> b) {
  return {_mm512_add_ps(a.lo, b.lo), _mm512_add_ps(a.hi, b.hi)};
}
INLINE Pack<double> operator+(Pack<double> a, Pack<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
INLINE Pack<float> operator-(Pack<float> a, Pack<float> b) {
  return {_mm512_sub_ps(a.lo, b.lo), _mm512_sub_ps(a.hi, b.hi)};
}
INLINE Pack<double> operator-(Pack<double> a, Pack<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
INLINE Pack<float> operator*(Pack<float> a, Pack<float> b) {
  return {_mm512_mul_ps(a.lo, b.lo), _mm512_mul_ps(a.hi, b.hi)};
}
INLINE Pack<double> operator*(Pack<double> a, Pack<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) {
  return {_mm512_fmadd_ps(a.lo, b.lo, c.lo), _mm512_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

INLINE Pack<float> lesser(Pack<float> bound, Pack<float> a) {
  return {_mm512_min_ps(bound.lo, a.lo), _mm512_min_ps(bound.hi, a.hi)};
}
INLINE Pack<double> lesser(Pack<double> bound, Pack<double> a) { return {_mm512_min_pd(bound.v, a.v)}; }
INLINE Pack<float> greater(Pack<float> bound, Pack<float> a) {
  return {_mm512_max_ps(bound.lo, a.lo), _mm512_max_ps(bound.hi, a.hi)};
}
INLINE Pack<double> greater(Pack<double> bound, Pack<double> a) { return {_mm512_max_pd(bound.v, a.v)}; }
INLINE Pack<float> magnitude(Pack<float> a) { return {_mm512_abs_ps(a.lo), _mm512_abs_ps(a.hi)}; }
INLINE Pack<double> magnitude(Pack<double> a) { return {_mm512_abs_pd(a.v)}; }
// By one step of Newton's from 14 bits, as a division of sixteen is slow.
INLINE __m512 reciprocal(__m512 a) {
  const __m512 near = _mm512_rcp14_ps(a);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(a, near, _mm512_set1_ps(1)), near, near);
}
INLINE Pack<float> reciprocal(Pack<float> a) { return {reciprocal(a.lo), reciprocal(a.hi)}; }
INLINE Pack<double> reciprocal(Pack<double> a) { return {_mm512_div_pd(_mm512_set1_pd(1), a.v)}; }
INLINE Pack<float> scaled(Pack<float> a, Pack<float> n) {
  return {_mm512_scalef_ps(a.lo, n.lo), _mm512_scalef_ps(a.hi, n.hi)};
}

INLINE Pack<float>::Lanes passes(Pack<float> z) {
  const __m512 zero = _mm512_setzero_ps();
  return {_mm512_cmp_ps_mask(z.lo, zero, _CMP_NLE_UQ), _mm512_cmp_ps_mask(z.hi, zero, _CMP_NLE_UQ)};
}
INLINE __mmask8 passes(Pack<double> z) { return _mm512_cmp_pd_mask(z.v, _mm512_setzero_pd(), _CMP_NLE_UQ); }
INLINE Pack<float>::Lanes positive(Pack<float> z) {
  const __m512 zero = _mm512_setzero_ps();
  return {_mm512_cmp_ps_mask(z.lo, zero, _CMP_GT_OQ), _mm512_cmp_ps_mask(z.hi, zero, _CMP_GT_OQ)};
}
INLINE __mmask8 positive(Pack<double> z) { return _mm512_cmp_pd_mask(z.v, _mm512_setzero_pd(), _CMP_GT_OQ); }
INLINE Pack<float>::Lanes both(Pack<float>::Lanes lanes, Pack<float>::Lanes others) {
  return {_kand_mask16(lanes.lo, others.lo), _kand_mask16(lanes.hi, others.hi)};
}
INLINE __mmask8 both(__mmask8 lanes, __mmask8 others) { return _kand_mask8(lanes, others); }
INLINE Pack<float> select(Pack<float>::Lanes lanes, Pack<float> a, Pack<float> b) {
  return {_mm512_mask_mov_ps(b.lo, lanes.lo, a.lo), _mm512_mask_mov_ps(b.hi, lanes.hi, a.hi)};
}
INLINE Pack<double> select(__mmask8 lanes, Pack<double> a, Pack<double> b) { return {_mm512_mask_mov_pd(b.v, lanes, a.v)}; }
INLINE Pack<float> keep(Pack<float>::Lanes lanes, Pack<float> a) {
  return {_mm512_maskz_mov_ps(lanes.lo, a.lo), _mm512_maskz_mov_ps(lanes.hi, a.hi)};
}
INLINE Pack<double> keep(__mmask8 lanes, Pack<double> a) { return {_mm512_maskz_mov_pd(lanes, a.v)}; }
template <class A>
INLINE uint32_t bits(typename Pack<A>::Lanes lanes) {
  if constexpr (sizeof(A) == 4) return lanes.lo | static_cast<uint32_t>(lanes.hi) << 16;
  else return lanes;
}
template <class A>
INLINE typename Pack<A>::Lanes lanes_of(uint32_t bits) {
  if constexpr (sizeof(A) == 4) return {static_cast<__mmask16>(bits), static_cast<__mmask16>(bits >> 16)};
  else return static_cast<__mmask8>(bits);
}

// The sum of all lanes, in double.
INLINE double total(Pack<double> a) { return _mm512_reduce_add_pd(a.v); }
INLINE double total(Pack<float> a) {
  const auto wide = [](__m256 v) { return _mm512_cvtps_pd(v); };
  const __m512d lo = _mm512_add_pd(wide(_mm512_castps512_ps256(a.lo)), wide(_mm512_extractf32x8_ps(a.lo, 1)));
  const __m512d hi = _mm512_add_pd(wide(_mm512_castps512_ps256(a.hi)), wide(_mm512_extractf32x8_ps(a.hi, 1)));
  return _mm512_reduce_add_pd(_mm512_add_pd(lo, hi));
}

INLINE __mmask32 first(int64_t n) { return (1u << n) - 1; }
INLINE __mmask16 low(__mmask32 lanes) { return static_cast<__mmask16>(lanes); }
INLINE __mmask16 high(__mmask32 lanes) { return static_cast<__mmask16>(lanes >> 16); }

INLINE Pack<float> load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
INLINE Pack<float> load(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(low(first(n)), p), _mm512_maskz_loadu_ps(high(first(n)), p + 16)};
}
INLINE void store(float* p, Pack<float> a) {
  _mm512_storeu_ps(p, a.lo);
  _mm512_storeu_ps(p + 16, a.hi);
}
INLINE void store(float* p, Pack<float> a, int64_t n) {
  _mm512_mask_storeu_ps(p, low(first(n)), a.lo);
  _mm512_mask_storeu_ps(p + 16, high(first(n)), a.hi);
}
INLINE void stream(float* p, Pack<float> a) {
  _mm512_stream_ps(p, a.lo);
  _mm512_stream_ps(p + 16, a.hi);
}

INLINE Pack<double> load(const double* p) { return {_mm512_loadu_pd(p)}; }
INLINE Pack<double> load(const double* p, int64_t n) {
  return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(first(n)), p)};
}
INLINE void store(double* p, Pack<double> a) { _mm512_storeu_pd(p, a.v); }
INLINE void store(double* p, Pack<double> a, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first(n)), a.v);
}
INLINE void stream(double* p, Pack<double> a) { _mm512_stream_pd(p, a.v); }

// Thirty-two values of two bytes.
using Halves = __m512i;
INLINE Halves load_halves(const void* p) { return _mm512_loadu_si512(p); }
INLINE Halves load_halves(const void* p, int64_t n) { return _mm512_maskz_loadu_epi16(first(n), p); }
INLINE void store_halves(void* p, Halves a) { _mm512_storeu_si512(p, a); }
INLINE void store_halves(void* p, Halves a, int64_t n) { _mm512_mask_storeu_epi16(p, first(n), a); }
INLINE void stream_halves(void* p, Halves a) { _mm512_stream_si512(static_cast<__m512i*>(p), a); }

// Of two registers of sixteen uint32, word ``first`` and every second one after it.
INLINE __m512i every_second(int first) {
  const __m512i numbers = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                           22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_add_epi16(numbers, _mm512_set1_epi16(static_cast<int16_t>(first)));
}
// Sixteen words from ``first`` on, each in the upper half of a uint32.
INLINE __m512 upper(Halves a, int first) {
  const __m512i pairs = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i numbers = _mm512_slli_epi32(_mm512_add_epi32(pairs, _mm512_set1_epi32(first)), 16);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, numbers, a));
}
INLINE Pack<float> from_bfloat16(Halves a) { return {upper(a, 0), upper(a, 16)}; }
INLINE __m512i rounded_to_bfloat16(__m512 a) {
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
INLINE Halves to_bfloat16(Pack<float> a) {
  return _mm512_permutex2var_epi16(rounded_to_bfloat16(a.lo), every_second(1), rounded_to_bfloat16(a.hi));
}
INLINE Pack<float> from_float16(Halves a) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(a)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1))};
}
INLINE Halves to_float16(Pack<float> a) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT)),
                            _mm512_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT), 1);
}

INLINE void fence() { _mm_sfence(); }

}  // namespace resfused
