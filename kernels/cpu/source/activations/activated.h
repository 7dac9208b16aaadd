// The activation of a node: the one compiled for, or with kAny the one that a call names, looked up for every pack.
//
// Values and gradients are PyTorch's; where its loops over packs and over single elements differ, which is at NaN, those
// of single elements.
#pragma once

#include "../call.h"
#include "../packs/pack.h"
#include "smooth.h"

namespace resfused {

constexpr int64_t kAny = -1;

template <class A, int64_t NAME>
class Activated {
  using Lanes = typename Pack<A>::Lanes;

 public:
  // Whether a derivative may have any value, also none, and is made of a residual without a norm too.
  static constexpr bool kSmooth = NAME == kAny || NAME >= kSilu;
  // Whether a slope takes longer than what it is made of takes to come from memory.
  static constexpr bool kSlow = kSmooth && NAME != kHardswish;

  explicit Activated(const Function& f)
      : name_(NAME == kAny ? f.name : NAME), negative_slope_(static_cast<A>(f.negative_slope)) {}
  // Whether the gradient is not dy as it comes.
  bool has_slope() const { return name() != kIdentity; }

  INLINE Pack<A> value(Pack<A> z) const {
    switch (name()) {
      case kIdentity: return z;
      case kRelu: return keep(passes(z), z);
      case kRelu6: return to_six(z);
      case kLeakyRelu: return select(positive(z), z, z * all(negative_slope_));
      case kHardsigmoid: return hardsigmoid(z);
      case kHardswish: return z * hardsigmoid(z);
      default: return NAME == kAny ? called_value(name(), z) : smooth_value(NAME, z);
    }
  }

  // Of those whose derivative has two values: where it has the one.
  INLINE Lanes on(Pack<A> z) const {
    switch (name()) {
      case kRelu: return passes(z);
      case kRelu6: return both(passes(z), passes(all(A(6)) - z));
      case kHardsigmoid: return both(positive(z + all(A(3))), positive(all(A(3)) - z));
      default: return positive(z);
    }
  }
  // Of the ReLUs a select, as 0 times infinity would be NaN.
  INLINE Pack<A> gradient(Lanes on, Pack<A> dy) const {
    switch (name()) {
      case kRelu:
      case kRelu6: return keep(on, dy);
      case kHardsigmoid: return keep(on, dy * all(kSixth));
      default: return select(on, dy, dy * all(negative_slope_));
    }
  }

  INLINE Pack<A> gradient_at(Pack<A> z, Pack<A> dy) const {
    switch (name()) {
      case kRelu:
      case kRelu6:
      case kHardsigmoid:
      case kLeakyRelu: return gradient(on(z), dy);
      case kHardswish: {
        const Pack<A> inner = dy * fma(z, all(A(1) / 3), all(A(0.5)));
        return keep(passes(z + all(A(3))), select(positive(all(A(3)) - z), inner, dy));
      }
      default: return dy * (NAME == kAny ? called_slope(name(), z) : smooth_slope(NAME, z));
    }
  }

 private:
  INLINE int64_t name() const { return NAME == kAny ? name_ : NAME; }
  static constexpr A kSixth = A(1) / 6;
  static INLINE Pack<A> to_six(Pack<A> z) { return lesser(all(A(6)), greater(zeros<A>(), z)); }
  static INLINE Pack<A> hardsigmoid(Pack<A> z) { return to_six(z + all(A(3))) * all(kSixth); }

  int64_t name_;
  A negative_slope_;
};

}  // namespace resfused
