// The loops of the backward over spans: the gradient of what the activation was taken of, its sums, and what is made of it.
#pragma once

#include <cstdint>

#include "activations/activated.h"
#include "partition.h"
#include "storage.h"
#include "vectors.h"

namespace resfused {
// Of one unit: what is called once is inlined.
namespace {

// Of one channel or lane: the sums of dz, dz (x - mean) and dz (residual - mean).
template <class A>
struct Sums {
  Pack<A> dz, dz_x, dz_residual;
};

template <class Kind, class Partition, int NORMS>
class GradientLoops {
  using A = typename Kind::A;
  using Elements = typename Kind::Elements;
  using Norms = NormPacks<A, Partition>;
  using Chosen = Activated<A, ACTIVATION>;

 public:
  // Of dz, dz (x - mean), and dz (residual - mean).
  static constexpr int kSumRows = 1 + NORMS;
  static constexpr bool kSlow = Chosen::kSlow;

  // What the loops read beside the activations, and how far rows of these and of their mask lie apart.
  struct Beside {
    const Rows<A>& norm;
    const uint8_t* mask;
    int64_t stride, mask_stride;
  };

  GradientLoops(const BackwardCall& call, bool reads_dz, bool past)
      : call_(call), activation_(call.activation), reads_dz_(reads_dz), past_(past) {}

  // The sums of a span within a channel.
  void sum(const Beside& beside, Span s, Sums<A>& of_channel) const {
    const Inputs in = inputs(beside, s, false);
    const Norms norms(beside.norm, s.c);
    Sums<A> sums = of_channel;
    walk<A>(s.n, [&](int64_t i, auto some) INLINED { add(step(in, 0, 0, i, some, norms), sums); });
    of_channel = sums;
  }

  // The sums of as many spans over channels, one below the other, into rows.
  void sum(const Beside& beside, Span s, int64_t spans, A* rows, int64_t apart) const {
    const Inputs in = inputs(beside, s, false);
    const Norms norms(beside.norm, s.c);
    const int64_t stride = beside.stride, mask_stride = beside.mask_stride;
    walk<A>(s.n, [&](int64_t i, auto some) INLINED {
      Sums<A> sums = loaded(rows + i, apart);
      for (int64_t r = 0; r < spans; r++) add(step(in, r * stride, r * mask_stride, i, some, norms), sums);
      save(rows + i, sums, apart, some);
    });
  }

  // The gradients that need no sums, and the sums within a channel.
  void sum_and_write(const Beside& beside, Span s, Sums<A>& of_channel) const {
    Sums<A> sums = of_channel;
    write_early(beside, s, [&](int64_t, auto, const Step& found) INLINED { add(found, sums); });
    of_channel = sums;
  }

  // The same over channels, with sums where there are rows for them.
  void sum_and_write(const Beside& beside, Span s, A* rows, int64_t apart) const {
    write_early(beside, s, [&](int64_t i, auto some, const Step& found) INLINED {
      if (rows == nullptr) return;
      Sums<A> sums = loaded(rows + i, apart);
      add(found, sums);
      save(rows + i, sums, apart, some);
    });
  }

  // The gradients that waited for the sums.
  void apply(const Beside& beside, Span s) const {
    const Inputs in = inputs(beside, s, reads_dz_);
    const Outputs out = outputs(s, call_.phases == kAll && !reads_dz_, true);
    const Norms norms(beside.norm, s.c);
    walk<A>(s.n, [&](int64_t i, auto some) INLINED {
      const Step found = step(in, 0, 0, i, some, norms);
      if (out.dz) out.dz.store(i, some, found.dz, out.past_dz);
      if (out.dx) out.dx.store(i, some, input_gradient(norms, 0, found.dz, found.centred, i), out.past_dx);
      if constexpr (NORMS == 2) {
        if (out.dresidual) {
          const Pack<A> value = input_gradient(norms, 1, found.dz, found.residual_centred, i);
          out.dresidual.store(i, some, value, out.past_dresidual);
        }
      }
    });
  }

 private:
  // What a span reads: of the gradient dz, where ``is_dz`` says so, or dy and perhaps its second half.
  struct Inputs {
    Elements x, residual, gradient, fork;
    const uint8_t* mask;
    bool is_dz;
  };
  Inputs inputs(const Beside& beside, Span s, bool is_dz) const {
    const Tensor none{nullptr, call_.dy.dtype};
    // What was not kept nothing depends on. dy, which is read anyway, stands in its place: a branch is a loop more.
    const Tensor &x = call_.x ? call_.x : call_.dy, &residual = NORMS == 2 && !call_.residual ? call_.dy : call_.residual;
    return {Elements(x) + s.at,
            Elements(residual) + s.at,
            Elements(is_dz ? call_.dz : call_.dy) + s.at,
            Elements(is_dz ? none : call_.dy_fork) + s.at,
            is_dz || beside.mask == nullptr ? nullptr : beside.mask + s.bits,
            is_dz};
  }

  // The inputs less their means, and the gradient of what the activation was taken of.
  struct Step {
    Pack<A> centred, residual_centred, dz;
  };
  template <class N>
  INLINE Step step(const Inputs& in, int64_t row, int64_t mask_row, int64_t i, N some, const Norms& norms) const {
    const Pack<A> centred = in.x.load(row + i, some) - norms.get(0, kMean, i);
    Pack<A> residual_centred = centred, dz = in.gradient.load(row + i, some);
    if constexpr (NORMS == 2) residual_centred = in.residual.load(row + i, some) - norms.get(1, kMean, i);
    if (in.fork) dz = dz + in.fork.load(row + i, some);
    if (in.mask != nullptr) {
      dz = activation_.gradient(lanes_of<A>(load_bits<A>(in.mask + mask_row, i, some)), dz);
    } else if (!in.is_dz && activation_.has_slope()) {
      Pack<A> z = norms.affine(0, centred, i);
      if constexpr (NORMS == 2) {
        z = z + norms.affine(1, residual_centred, i);
      } else if constexpr (Chosen::kSmooth) {
        if (in.residual) z = z + in.residual.load(row + i, some);
      }
      dz = activation_.gradient_at(z, dz);
      // Beyond the last element x is 0, of which z may be infinite, and its derivative no number.
      if constexpr (Chosen::kSmooth) dz = only(some, dz);
    }
    return {centred, residual_centred, dz};
  }

  // Where a span's gradients go: ``past`` the caches where they are large and lie on whole lines.
  struct Outputs {
    Elements dz, dx, dresidual;
    bool past_dz, past_dx, past_dresidual;
  };
  Outputs outputs(Span s, bool dz, bool inputs) const {
    const Tensor none{nullptr, call_.dy.dtype};
    const Elements z = Elements(dz ? call_.dz : none) + s.at, x = Elements(inputs ? call_.dx : none) + s.at,
                   r = Elements(inputs ? call_.dresidual : none) + s.at;
    return {z, x, r, past_ && z.aligned(), past_ && x.aligned(), past_ && r.aligned()};
  }

  static INLINE void add(const Step& found, Sums<A>& sums) {
    sums.dz = sums.dz + found.dz;
    sums.dz_x = fma(found.dz, found.centred, sums.dz_x);
    if constexpr (NORMS == 2) sums.dz_residual = fma(found.dz, found.residual_centred, sums.dz_residual);
  }

  static INLINE Sums<A> loaded(const A* rows, int64_t stride) {
    return {load(rows), load(rows + stride), NORMS == 2 ? load(rows + 2 * stride) : zeros<A>()};
  }
  template <class N>
  static INLINE void save(A* rows, const Sums<A>& sums, int64_t stride, N some) {
    const Typed<A> at(rows);
    at.store(0, some, sums.dz, false);
    at.store(stride, some, sums.dz_x, false);
    if constexpr (NORMS == 2) at.store(2 * stride, some, sums.dz_residual, false);
  }

  template <class Add>
  void write_early(const Beside& beside, Span s, Add add_up) const {
    const Inputs in = inputs(beside, s, false);
    const Outputs out = outputs(s, true, call_.phases == kLocal);
    const Norms norms(beside.norm, s.c);
    walk<A>(s.n, [&](int64_t i, auto some) INLINED {
      const Step found = step(in, 0, 0, i, some, norms);
      add_up(i, some, found);
      if (out.dz) out.dz.store(i, some, found.dz, out.past_dz);
      if (out.dx) out.dx.store(i, some, found.dz * norms.get(0, kScale, i), out.past_dx);
      if constexpr (NORMS == 2) {
        if (out.dresidual) out.dresidual.store(i, some, found.dz * norms.get(1, kScale, i), out.past_dresidual);
      }
    });
  }

  static INLINE Pack<A> input_gradient(const Norms& norms, int norm, Pack<A> dz, Pack<A> centred, int64_t i) {
    const Pack<A> rest = fma(centred, norms.get(norm, kSlope, i), norms.get(norm, kOffset, i));
    return fma(dz, norms.get(norm, kScale, i), rest);
  }

  const BackwardCall& call_;
  const Chosen activation_;
  // Whether the last phase finds dz written: where that is less to read than two halves of dy.
  const bool reads_dz_, past_;
};

}  // namespace
}  // namespace resfused
