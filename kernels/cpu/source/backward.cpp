// Backward of relu(norm(x) + s), for the storage KIND: channel sums of the gradient, their merge, the inputs' gradients.

#include <algorithm>

#include "entry.h"
#include "partition.h"
#include "storage.h"
#include "vectors.h"

namespace resfused {
namespace {

// Of one channel or lane: the sums of dz, dz (x - mean) and dz (residual - mean).
template <class A>
struct Sums {
  Pack<A> dz, dz_x, dz_residual;
};

template <class Kind, class Partition, int NORMS>
class Backward {
  using A = typename Kind::A;
  using Elements = typename Kind::Elements;
  using Norms = NormPacks<A, Partition>;
  // Of dz, dz (x - mean), and dz (residual - mean).
  static constexpr int kSumRows = 1 + NORMS;

 public:
  Backward(const BackwardCall& call, const Partition& p)
      : call_(call),
        p_(p),
        norm_(NORMS * kRowsOfNorm, call.shape.channels),
        partials_(reduces() ? kSumRows * p.parts() : 0, call.shape.channels),
        reads_dz_(call.dz && call.dz.dtype == call.dy.dtype &&
                  (call.phases == kInputs || (call.phases == kAll && call.dy_fork && !p.channel_by_channel()))),
        writes_early_(call.phases == kLocal || (call.dz && call.phases == kSums) ||
                      (reads_dz_ && call.phases == kAll)),
        past_(bytes() > call.machine.shared_cache) {}

  __attribute__((noinline)) void prepare(int64_t block) {
    each_channel(block, [&](int64_t c) {
      for (int i = 0; i < NORMS; i++) {
        fill(norm_, i, c, mean(i, c), rstd(i, c), norm(i));
        if (call_.phases == kInputs) finish(i, c, stats_row(call_.sums, 0)[c], stats_row(call_.sums, 1 + i)[c]);
      }
    });
  }

  __attribute__((noinline)) void first(int64_t part, int64_t block) {
    if (!reduces() && !writes_early_) return;
    const int64_t first = block * p_.channels_each();
    if constexpr (std::is_same_v<Partition, ChannelsLast>) {
      A* rows = reduces() ? partials_[part * kSumRows] : nullptr;
      if (reduces()) std::fill_n(rows, kSumRows * partials_.stride(), A(0));
      if (writes_early_) {
        p_.spans(part, block, [&](Span s) { sum_and_write(s, rows); });
      } else {
        p_.groups(part, [&](Span s, int64_t spans) { sum(s, spans, rows); });
      }
    } else {
      Sums<A> sums[kChannels];
      for (int64_t c = 0; c < p_.channels_in(block); c++) sums[c] = {zeros<A>(), zeros<A>(), zeros<A>()};
      p_.spans(part, block, [&](Span s) {
        writes_early_ ? sum_and_write(s, sums[s.c - first]) : sum(s, sums[s.c - first]);
      });
      for (int64_t c = 0; reduces() && c < p_.channels_in(block); c++) {
        A* rows = partials_[part * kSumRows] + first + c;
        rows[0] = static_cast<A>(total(sums[c].dz));
        rows[partials_.stride()] = static_cast<A>(total(sums[c].dz_x));
        if constexpr (NORMS == 2) rows[2 * partials_.stride()] = static_cast<A>(total(sums[c].dz_residual));
      }
    }
    if (past_) fence();
  }

  __attribute__((noinline)) void merge(int64_t block) {
    if (!reduces()) return;
    double sums[kSumRows][kChannels] = {};
    const int64_t first = block * p_.channels_each(), n = p_.channels_in(block);
    for (int64_t part = 0; part < p_.parts(); part++) {
      for (int row = 0; row < kSumRows; row++) {
        const A* values = partials_[part * kSumRows + row] + first;
        for (int64_t c = 0; c < n; c++) sums[row][c] += values[c];
      }
    }
    for (int64_t c = 0; c < n; c++) {
      double of_channel[kSumRows] = {sums[0][c]};
      for (int i = 0; i < NORMS; i++) of_channel[1 + i] = sums[1 + i][c] * rstd(i, first + c);
      found(first + c, of_channel);
    }
  }

  __attribute__((noinline)) void second(int64_t part, int64_t block) {
    const bool waiting = call_.dx || call_.dresidual || (call_.dz && !reads_dz_);
    if (!waiting || call_.phases == kSums || call_.phases == kLocal) return;
    p_.spans(part, block, [&](Span s) { apply(s); });
    if (past_) fence();
  }

 private:
  // Whether anything needs the sums.
  bool reduces() const {
    const bool parameters = call_.dweight || call_.dbias || call_.dresidual_weight || call_.dresidual_bias;
    return call_.phases == kSums || (call_.phases != kInputs && parameters) ||
           (call_.phases == kAll && (call_.dx || call_.dresidual));
  }
  A* stats_row(char* rows, int64_t row) const { return reinterpret_cast<A*>(rows) + row * call_.shape.channels; }
  const Norm& norm(int i) const { return i == 0 ? call_.norm : call_.residual_norm; }
  A mean(int i, int64_t c) const {
    return call_.stats != nullptr ? stats_row(call_.stats, 2 * i)[c] : read<A>(norm(i).running_mean, c);
  }
  A rstd(int i, int64_t c) const {
    if (call_.stats != nullptr) return stats_row(call_.stats, 2 * i + 1)[c];
    return rstd_of<A>(read<A>(norm(i).running_var, c), norm(i).eps);
  }
  // All that the last phase moves.
  int64_t bytes() const {
    int64_t each = Elements(call_.dy).element_size() + Elements(call_.x).element_size();
    for (const Tensor* t : {&call_.dy_fork, &call_.residual, &call_.dx, &call_.dz, &call_.dresidual}) {
      if (*t) each += Elements(*t).element_size();
    }
    return call_.shape.numel() * each;
  }

  template <class Visit>
  void each_channel(int64_t block, Visit visit) const {
    for (int64_t c = 0; c < p_.channels_in(block); c++) visit(block * p_.channels_each() + c);
  }

  // A channel's sums: of dz, and of dz times each normalised input.
  void found(int64_t c, const double* sums) {
    if (call_.sums != nullptr) {
      for (int row = 0; row < kSumRows; row++) stats_row(call_.sums, row)[c] = static_cast<A>(sums[row]);
    }
    if (call_.dbias) write<A>(call_.dbias, c, sums[0]);
    if (call_.dweight) write<A>(call_.dweight, c, sums[1]);
    if (call_.dresidual_bias) write<A>(call_.dresidual_bias, c, sums[0]);
    if (NORMS == 2 && call_.dresidual_weight) write<A>(call_.dresidual_weight, c, sums[kSumRows - 1]);
    const double values = static_cast<double>(call_.shape.values());
    for (int i = 0; i < NORMS; i++) finish(i, c, sums[0] / values, sums[1 + i] / values);
  }

  // weight rstd (dz - mean_dz - x̂ mean_dz_x) as two multiply-adds of dz and x - mean.
  void finish(int i, int64_t c, double mean_dz, double mean_dz_x) {
    const int row = i * kRowsOfNorm;
    const double scale = norm_[row + kScale][c];
    norm_[row + kSlope][c] = static_cast<A>(-scale * rstd(i, c) * mean_dz_x);
    norm_[row + kOffset][c] = static_cast<A>(-scale * mean_dz);
  }

  // What a span reads: of the gradient dz, where ``is_dz`` says so, or dy and perhaps its second half.
  struct Inputs {
    Elements x, residual, gradient, fork;
    const uint8_t* mask;
    bool is_dz;
  };
  Inputs inputs(Span s, bool is_dz) const {
    const Tensor none{nullptr, call_.dy.dtype};
    return {Elements(call_.x) + s.at,
            Elements(call_.residual) + s.at,
            Elements(is_dz ? call_.dz : call_.dy) + s.at,
            Elements(is_dz ? none : call_.dy_fork) + s.at,
            is_dz || call_.mask == nullptr ? nullptr : call_.mask + s.bits,
            is_dz};
  }

  // The inputs less their means, and the gradient of what the ReLU was taken of: dy where it let z through. A select,
  // as 0 times infinity would be NaN.
  struct Step {
    Pack<A> centred, residual_centred, dz;
  };
  template <class N>
  static INLINE Step step(const Inputs& in, int64_t row, int64_t mask_row, int64_t i, N some, const Norms& norms) {
    const Pack<A> centred = in.x.load(row + i, some) - norms.get(0, kMean, i);
    Pack<A> residual_centred = centred, dz = in.gradient.load(row + i, some);
    if constexpr (NORMS == 2) residual_centred = in.residual.load(row + i, some) - norms.get(1, kMean, i);
    if (in.fork) dz = dz + in.fork.load(row + i, some);
    if (in.mask != nullptr) {
      dz = keep(lanes_of<A>(load_bits<A>(in.mask + mask_row, i, some)), dz);
    } else if (!in.is_dz) {
      Pack<A> z = norms.affine(0, centred, i);
      if constexpr (NORMS == 2) z = z + norms.affine(1, residual_centred, i);
      dz = keep(passes(z), dz);
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

  // The sums of a span within a channel.
  void sum(Span s, Sums<A>& of_channel) const {
    const Inputs in = inputs(s, false);
    const Norms norms(norm_, s.c);
    Sums<A> sums = of_channel;
    walk<A>(s.n, [&](int64_t i, auto some) INLINED { add(step(in, 0, 0, i, some, norms), sums); });
    of_channel = sums;
  }

  // The sums of as many spans over channels, one below the other, into rows.
  void sum(Span s, int64_t spans, A* rows) const {
    const Inputs in = inputs(s, false);
    const Norms norms(norm_, s.c);
    const int64_t stride = p_.stride(), mask_stride = p_.mask_stride();
    walk<A>(s.n, [&](int64_t i, auto some) INLINED {
      Sums<A> sums = loaded(rows + i);
      for (int64_t r = 0; r < spans; r++) add(step(in, r * stride, r * mask_stride, i, some, norms), sums);
      save(rows + i, sums);
    });
  }

  INLINE Sums<A> loaded(const A* rows) const {
    const int64_t stride = partials_.stride();
    return {load(rows), load(rows + stride), NORMS == 2 ? load(rows + 2 * stride) : zeros<A>()};
  }
  INLINE void save(A* rows, const Sums<A>& sums) const {
    const int64_t stride = partials_.stride();
    store(rows, sums.dz);
    store(rows + stride, sums.dz_x);
    if constexpr (NORMS == 2) store(rows + 2 * stride, sums.dz_residual);
  }

  // The gradients that need no sums, and the sums within a channel.
  void sum_and_write(Span s, Sums<A>& of_channel) const {
    Sums<A> sums = of_channel;
    write_early(s, [&](int64_t, const Step& found) INLINED { add(found, sums); });
    of_channel = sums;
  }

  // The same over channels, with sums where there are rows for them.
  void sum_and_write(Span s, A* rows) const {
    write_early(s, [&](int64_t i, const Step& found) INLINED {
      if (rows == nullptr) return;
      Sums<A> sums = loaded(rows + i);
      add(found, sums);
      save(rows + i, sums);
    });
  }

  template <class Add>
  void write_early(Span s, Add add_up) const {
    const Inputs in = inputs(s, false);
    const Outputs out = outputs(s, true, call_.phases == kLocal);
    const Norms norms(norm_, s.c);
    walk<A>(s.n, [&](int64_t i, auto some) INLINED {
      const Step found = step(in, 0, 0, i, some, norms);
      add_up(i, found);
      if (out.dz) out.dz.store(i, some, found.dz, out.past_dz);
      if (out.dx) out.dx.store(i, some, found.dz * norms.get(0, kScale, i), out.past_dx);
      if constexpr (NORMS == 2) {
        if (out.dresidual) out.dresidual.store(i, some, found.dz * norms.get(1, kScale, i), out.past_dresidual);
      }
    });
  }

  // The gradients that waited for the sums.
  void apply(Span s) const {
    const Inputs in = inputs(s, reads_dz_);
    const Outputs out = outputs(s, call_.phases == kAll && !reads_dz_, true);
    const Norms norms(norm_, s.c);
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
  static INLINE Pack<A> input_gradient(const Norms& norms, int norm, Pack<A> dz, Pack<A> centred, int64_t i) {
    const Pack<A> rest = fma(centred, norms.get(norm, kSlope, i), norms.get(norm, kOffset, i));
    return fma(dz, norms.get(norm, kScale, i), rest);
  }

  const BackwardCall& call_;
  const Partition& p_;
  Rows<A> norm_, partials_;
  // Whether the last phase finds dz written: where that is less to read than two halves of dy.
  const bool reads_dz_;
  const bool writes_early_, past_;
};

template <class Kind, class Partition>
void run_form(const BackwardCall& call) {
  const Partition p(call.shape, call.machine, typename Kind::Elements(call.x).element_size());
  const auto with = [&](auto norms) {
    Backward<Kind, Partition, decltype(norms)::value> node(call, p);
    run(node, p, call.shape.numel() < kGrain ? 1 : call.machine.threads);
  };
  call.norms == 1 ? with(std::integral_constant<int, 1>{}) : with(std::integral_constant<int, 2>{});
}

}  // namespace

template <>
void backward<KIND>(const BackwardCall& call) {
  call.shape.channels_last ? run_form<KIND, ChannelsLast>(call) : run_form<KIND, Contiguous>(call);
}

}  // namespace resfused
