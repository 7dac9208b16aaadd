// The ReLU, which a library of its own is compiled for.
#pragma once

#include "../call.h"
#include "../packs/pack.h"

namespace resfused {

template <class A>
class Relu {
  using Lanes = typename Pack<A>::Lanes;

 public:
  // Whether a derivative may have any value, also none, and is made of a residual without a norm too.
  static constexpr bool kSmooth = false;

  explicit Relu(const Function&) {}
  bool has_slope() const { return true; }
  INLINE Pack<A> value(Pack<A> z) const { return keep(passes(z), z); }
  INLINE Lanes on(Pack<A> z) const { return passes(z); }
  // A select, as 0 times infinity would be NaN.
  INLINE Pack<A> gradient(Lanes on, Pack<A> dy) const { return keep(on, dy); }
  INLINE Pack<A> gradient_at(Pack<A> z, Pack<A> dy) const { return keep(passes(z), dy); }
};

}  // namespace resfused
