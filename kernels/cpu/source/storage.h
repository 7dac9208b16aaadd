// Activations in memory, as packs of the type of the arithmetic: by a dtype known when compiling, or looked up.
#pragma once

#include <cstdint>
#include <cstring>

#include "call.h"
#include "packs/pack.h"

namespace resfused {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

INLINE Pack<float> load(const BFloat16* p) { return from_bfloat16(load_halves(p)); }
INLINE Pack<float> load(const BFloat16* p, int64_t n) { return from_bfloat16(load_halves(p, n)); }
INLINE void store(BFloat16* p, Pack<float> a) { store_halves(p, to_bfloat16(a)); }
INLINE void store(BFloat16* p, Pack<float> a, int64_t n) { store_halves(p, to_bfloat16(a), n); }
INLINE void stream(BFloat16* p, Pack<float> a) { stream_halves(p, to_bfloat16(a)); }

INLINE Pack<float> load(const Float16* p) { return from_float16(load_halves(p)); }
INLINE Pack<float> load(const Float16* p, int64_t n) { return from_float16(load_halves(p, n)); }
INLINE void store(Float16* p, Pack<float> a) { store_halves(p, to_float16(a)); }
INLINE void store(Float16* p, Pack<float> a, int64_t n) { store_halves(p, to_float16(a), n); }
INLINE void stream(Float16* p, Pack<float> a) { stream_halves(p, to_float16(a)); }

// Elements of one dtype, or none.
template <class T>
struct Typed {
  T* at;

  explicit Typed(Tensor t) : at(reinterpret_cast<T*>(t.data)) {}
  explicit Typed(T* p) : at(p) {}
  explicit operator bool() const { return at != nullptr; }
  Typed operator+(int64_t n) const { return at == nullptr ? *this : Typed(at + n); }
  int64_t element_size() const { return sizeof(T); }
  bool aligned() const { return reinterpret_cast<uintptr_t>(at) % 64 == 0; }

  INLINE auto load(int64_t i, Whole) const { return resfused::load(at + i); }
  INLINE auto load(int64_t i, First f) const { return resfused::load(at + i, f.n); }
  // Past the caches with ``past``, which asks for an aligned address: where the outputs exceed the caches, ordinary
  // stores, which read the line first, took 20 to 50 % longer; where they do not, the next operator finds them there.
  template <class A>
  INLINE void store(int64_t i, Whole, Pack<A> a, bool past) const {
    past ? resfused::stream(at + i, a) : resfused::store(at + i, a);
  }
  template <class A>
  INLINE void store(int64_t i, First f, Pack<A> a, bool) const {
    resfused::store(at + i, a, f.n);
  }
};

// Elements of the dtype that the tensor says, for arithmetic in A.
template <class A>
struct AnyTyped {
  char* at;
  int64_t dtype;

  explicit AnyTyped(Tensor t) : at(t.data), dtype(t.dtype) {}
  AnyTyped(char* p, int64_t dtype) : at(p), dtype(dtype) {}
  explicit operator bool() const { return at != nullptr; }
  AnyTyped operator+(int64_t n) const { return at == nullptr ? *this : AnyTyped(at + n * element_size(), dtype); }
  int64_t element_size() const { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
  bool aligned() const { return false; }

  template <class N>
  Pack<A> load(int64_t i, N n) const;
  template <class N>
  void store(int64_t i, N n, Pack<A> a, bool) const;
};

template <class T>
inline T* in(char* at) {
  return reinterpret_cast<T*>(at);
}

template <>
template <class N>
inline Pack<float> AnyTyped<float>::load(int64_t i, N n) const {
  switch (dtype) {
    case kFloat32: return Typed<float>(in<float>(at)).load(i, n);
    case kBFloat16: return Typed<BFloat16>(in<BFloat16>(at)).load(i, n);
    default: return Typed<Float16>(in<Float16>(at)).load(i, n);
  }
}

template <>
template <class N>
inline void AnyTyped<float>::store(int64_t i, N n, Pack<float> a, bool) const {
  switch (dtype) {
    case kFloat32: return Typed<float>(in<float>(at)).store(i, n, a, false);
    case kBFloat16: return Typed<BFloat16>(in<BFloat16>(at)).store(i, n, a, false);
    default: return Typed<Float16>(in<Float16>(at)).store(i, n, a, false);
  }
}

// A float between which and ``value`` no number of two bytes lies: rounding it rounds ``value``, once.
inline float to_odd(double value) {
  float nearest = static_cast<float>(value);
  if (nearest == value || value != value) return nearest;
  uint32_t u;
  std::memcpy(&u, &nearest, sizeof u);
  const double magnitude = value < 0 ? -value : value;
  if ((nearest < 0 ? -double(nearest) : double(nearest)) > magnitude) u--;
  u |= 1;
  std::memcpy(&nearest, &u, sizeof u);
  return nearest;
}

inline int64_t lanes_in(Whole) { return Pack<double>::lanes; }
inline int64_t lanes_in(First f) { return f.n; }

template <>
template <class N>
inline Pack<double> AnyTyped<double>::load(int64_t i, N n) const {
  if (dtype == kFloat64) return Typed<double>(in<double>(at)).load(i, n);
  // Half a pack of float, widened.
  const First some{lanes_in(n)};
  float narrow[Pack<float>::lanes];
  resfused::store(narrow, AnyTyped<float>(at, dtype).load(i, some));
  double wide[Pack<double>::lanes];
  for (int64_t j = 0; j < Pack<double>::lanes; j++) wide[j] = narrow[j];
  return resfused::load(wide);
}

template <>
template <class N>
inline void AnyTyped<double>::store(int64_t i, N n, Pack<double> a, bool) const {
  if (dtype == kFloat64) return Typed<double>(in<double>(at)).store(i, n, a, false);
  const First some{lanes_in(n)};
  double wide[Pack<double>::lanes];
  resfused::store(wide, a);
  float narrow[Pack<float>::lanes] = {};
  for (int64_t j = 0; j < Pack<double>::lanes; j++) narrow[j] = dtype == kFloat32 ? float(wide[j]) : to_odd(wide[j]);
  AnyTyped<float>(at, dtype).store(i, some, resfused::load(narrow), false);
}

// The kinds that libraries are compiled for. Mixtures go without columns, which take seconds to compile.
struct Float32Kind {
  static constexpr bool kColumns = true;
  using A = float;
  using Elements = Typed<float>;
};
struct Bfloat16Kind {
  static constexpr bool kColumns = true;
  using A = float;
  using Elements = Typed<BFloat16>;
};
struct MixedKind {
  static constexpr bool kColumns = false;
  using A = float;
  using Elements = AnyTyped<float>;
};
struct WideKind {
  static constexpr bool kColumns = false;
  using A = double;
  using Elements = AnyTyped<double>;
};

}  // namespace resfused
