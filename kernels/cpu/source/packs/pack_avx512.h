// Pack in AVX-512: one register.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace resfused {

template <>
struct Pack<float> {
  static constexpr int64_t lanes = 16;
  using Lanes = __mmask16;
  __m512 v;
};

template <>
struct Pack<double> {
  static constexpr int64_t lanes = 8;
  using Lanes = __mmask8;
  __m512d v;
};

INLINE Pack<float> all(float value) { return {_mm512_set1_ps(value)}; }
INLINE Pack<double> all(double value) { return {_mm512_set1_pd(value)}; }
INLINE Pack<float> operator+(Pack<float> a, Pack<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Pack<double> operator+(Pack<double> a, Pack<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
INLINE Pack<float> operator-(Pack<float> a, Pack<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Pack<double> operator-(Pack<double> a, Pack<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
INLINE Pack<float> operator*(Pack<float> a, Pack<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Pack<double> operator*(Pack<double> a, Pack<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
INLINE Pack<float> fma(Pack<float> a, Pack<float> b, Pack<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Pack<double> fma(Pack<double> a, Pack<double> b, Pack<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

INLINE __mmask16 passes(Pack<float> z) { return _mm512_cmp_ps_mask(z.v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
INLINE __mmask8 passes(Pack<double> z) { return _mm512_cmp_pd_mask(z.v, _mm512_setzero_pd(), _CMP_NLE_UQ); }
INLINE Pack<float> keep(__mmask16 lanes, Pack<float> a) { return {_mm512_maskz_mov_ps(lanes, a.v)}; }
INLINE Pack<double> keep(__mmask8 lanes, Pack<double> a) { return {_mm512_maskz_mov_pd(lanes, a.v)}; }
template <class A>
INLINE uint32_t bits(typename Pack<A>::Lanes lanes) {
  return lanes;
}
template <class A>
INLINE typename Pack<A>::Lanes lanes_of(uint32_t bits) {
  return static_cast<typename Pack<A>::Lanes>(bits);
}

INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

INLINE Pack<float> load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE Pack<float> load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
INLINE void store(float* p, Pack<float> a) { _mm512_storeu_ps(p, a.v); }
INLINE void store(float* p, Pack<float> a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
INLINE void stream(float* p, Pack<float> a) { _mm512_stream_ps(p, a.v); }

INLINE Pack<double> load(const double* p) { return {_mm512_loadu_pd(p)}; }
INLINE Pack<double> load(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
INLINE void store(double* p, Pack<double> a) { _mm512_storeu_pd(p, a.v); }
INLINE void store(double* p, Pack<double> a, int64_t n) { _mm512_mask_storeu_pd(p, first(n), a.v); }
INLINE void stream(double* p, Pack<double> a) { _mm512_stream_pd(p, a.v); }

// Sixteen values of two bytes.
using Halves = __m256i;
INLINE Halves load_halves(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Halves load_halves(const void* p, int64_t n) { return _mm256_maskz_loadu_epi16(first(n), p); }
INLINE void store_halves(void* p, Halves a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
INLINE void store_halves(void* p, Halves a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), a); }
INLINE void stream_halves(void* p, Halves a) { _mm256_stream_si256(static_cast<__m256i*>(p), a); }

INLINE Pack<float> from_bfloat16(Halves a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16))};
}
INLINE Halves to_bfloat16(Pack<float> a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
INLINE Pack<float> from_float16(Halves a) { return {_mm512_cvtph_ps(a)}; }
INLINE Halves to_float16(Pack<float> a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

INLINE void fence() { _mm_sfence(); }

}  // namespace resfused
