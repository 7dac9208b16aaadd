// All activations but the ReLU, chosen at run time: a few operations here, or for the smooth ones a call for every pack.
//
// Values and gradients are PyTorch's; where its loops over packs and over single elements differ, which is at NaN, those
// of single elements.
#pragma once

#include "../call.h"
#include "../packs/pack.h"
#include "smooth.h"

namespace resfused {

template <class A>
class Any {
  using Lanes = typename Pack<A>::Lanes;

 public:
  static constexpr bool kSmooth = true;

  explicit Any(const Function& f) : name_(f.name), negative_slope_(static_cast<A>(f.negative_slope)) {}
  // Whether the gradient is not dy as it comes.
  bool has_slope() const { return name_ != kIdentity; }

  INLINE Pack<A> value(Pack<A> z) const {
    switch (name_) {
      case kIdentity: return z;
      case kRelu6: return to_six(z);
      case kLeakyRelu: return select(positive(z), z, z * all(negative_slope_));
      case kHardsigmoid: return hardsigmoid(z);
      case kHardswish: return z * hardsigmoid(z);
      default: return smooth(name_, z);
    }
  }

  // Of those whose derivative has two values: where it has the one.
  INLINE Lanes on(Pack<A> z) const {
    switch (name_) {
      case kRelu6: return both(passes(z), passes(all(A(6)) - z));
      case kHardsigmoid: return both(positive(z + all(A(3))), positive(all(A(3)) - z));
      default: return positive(z);
    }
  }
  INLINE Pack<A> gradient(Lanes on, Pack<A> dy) const {
    switch (name_) {
      case kRelu6: return keep(on, dy);
      case kHardsigmoid: return keep(on, dy * all(kSixth));
      default: return select(on, dy, dy * all(negative_slope_));
    }
  }

  INLINE Pack<A> gradient_at(Pack<A> z, Pack<A> dy) const {
    switch (name_) {
      case kRelu6:
      case kHardsigmoid:
      case kLeakyRelu: return gradient(on(z), dy);
      case kHardswish: {
        const Pack<A> inner = dy * fma(z, all(A(1) / 3), all(A(0.5)));
        return keep(passes(z + all(A(3))), select(positive(all(A(3)) - z), inner, dy));
      }
      default: return dy * smooth_slope(name_, z);
    }
  }

 private:
  static constexpr A kSixth = A(1) / 6;
  static INLINE Pack<A> to_six(Pack<A> z) { return lesser(all(A(6)), greater(zeros<A>(), z)); }
  static INLINE Pack<A> hardsigmoid(Pack<A> z) { return to_six(z + all(A(3))) * all(kSixth); }

  int64_t name_;
  A negative_slope_;
};

}  // namespace resfused
