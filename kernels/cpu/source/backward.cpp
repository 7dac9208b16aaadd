// Backward of relu(norm(x) + s), for the storage KIND: channel sums of the gradient, their merge, the inputs' gradients.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "columns.h"
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
  static constexpr bool kColumns = std::is_same_v<Partition, Columns>;

  // What the loops read beside the activations, and how far rows of these and of their mask lie apart.
  struct Beside {
    const Rows<A>& norm;
    const uint8_t* mask;
    int64_t stride, mask_stride;
  };

 public:
  Backward(const BackwardCall& call, const Partition& p)
      : call_(call),
        p_(p),
        norm_(NORMS * kRowsOfNorm, p.columns()),
        partials_(reduces() && !kColumns ? kSumRows * p.parts() : 0, call.shape.channels),
        reads_dz_(call.dz && call.dz.dtype == call.dy.dtype &&
                  (call.phases == kInputs || (call.phases == kAll && call.dy_fork && !p.channel_by_channel()))),
        writes_early_(call.phases == kLocal || (call.dz && call.phases == kSums) ||
                      (reads_dz_ && call.phases == kAll)),
        past_(past()) {}

  __attribute__((noinline)) void prepare(int64_t block) {
    each_channel(block, [&](int64_t c) {
      for (int i = 0; i < NORMS; i++) {
        fill(norm_, i, c, mean(i, c), rstd(i, c), norm(i));
        if (call_.phases == kInputs) finish(i, c, stats_row(call_.sums, 0)[c], stats_row(call_.sums, 1 + i)[c]);
      }
    });
    repeat(block);
  }

  __attribute__((noinline)) void first(int64_t part, int64_t block) {
    if (!reduces() && !writes_early_) return;
    const int64_t first = block * p_.channels_each();
    if constexpr (std::is_same_v<Partition, ChannelsLast>) {
      Rows<A> sums(reduces() ? kSumRows : 0, p_.columns());
      A* rows = reduces() ? sums[0] : nullptr;
      if (reduces()) std::fill_n(rows, kSumRows * sums.stride(), A(0));
      const Beside beside{norm_, call_.mask, p_.columns(), p_.mask_stride()};
      if (writes_early_) {
        p_.spans(part, block, [&](Span s) { sum_and_write(beside, s, rows, sums.stride()); });
      } else {
        p_.groups(part, [&](Span s, int64_t spans) { sum(beside, s, spans, rows, sums.stride()); });
      }
      for (int row = 0; reduces() && row < kSumRows; row++) {
        sums.fold(row, call_.shape.channels, p_.folded());
        std::copy_n(sums[row], call_.shape.channels, partials_[part * kSumRows + row]);
      }
    } else {
      const Beside beside{norm_, call_.mask, 0, 0};
      Sums<A> sums[kChannels];
      for (int64_t c = 0; c < p_.channels_in(block); c++) sums[c] = {zeros<A>(), zeros<A>(), zeros<A>()};
      p_.spans(part, block, [&](Span s) {
        writes_early_ ? sum_and_write(beside, s, sums[s.c - first]) : sum(beside, s, sums[s.c - first]);
      });
      for (int64_t c = 0; reduces() && c < p_.channels_in(block); c++) {
        A* rows = partials_[part * kSumRows] + first + c;
        rows[0] = static_cast<A>(total(sums[c].dz));
        rows[partials_.stride()] = static_cast<A>(total(sums[c].dz_x));
        if constexpr (NORMS == 2) rows[2 * partials_.stride()] = static_cast<A>(total(sums[c].dz_residual));
      }
    }
    fence();
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
      for (int i = 0; i < NORMS; i++) of_channel[1 + i] = sums[1 + i][c];
      total_found(first + c, of_channel);
    }
    repeat(block);
  }

  __attribute__((noinline)) void second(int64_t part, int64_t block) {
    if (!applies()) return;
    const Beside beside{norm_, call_.mask, 0, 0};
    p_.spans(part, block, [&](Span s) { apply(beside, s); });
    fence();
  }

  // All phases of a block of columns.
  void whole(int64_t block) {
    const int64_t columns = p_.channels_in(block) * p_.positions();
    prepare(block);
    Rows<A> norm(NORMS * kRowsOfNorm, columns), sums(reduces() ? kSumRows : 0, columns);
    for (int row = 0; row < NORMS * kRowsOfNorm; row++) {
      if (row % kRowsOfNorm <= kShift || call_.phases == kInputs) p_.expand(norm_[row], block, norm[row]);
    }
    std::vector<uint8_t> bits(joins_bits() ? p_.rows() * p_.mask_stride() : 0);
    for (int64_t image = 0; joins_bits() && image < p_.rows(); image++) {
      p_.join_bits(call_.mask, image, block, bits.data() + image * p_.mask_stride());
    }
    const Beside beside = joins_bits() ? Beside{norm, bits.data(), p_.stride(), p_.mask_stride()}
                                       : Beside{norm, call_.mask, p_.stride(), p_.stride() / 8};
    first_of_columns(beside, block, sums);
    for (int row = 0; reduces() && row < NORMS * kRowsOfNorm; row++) {
      if (row % kRowsOfNorm > kShift) p_.expand(norm_[row], block, norm[row]);
    }
    for (int64_t image = 0; applies() && image < p_.rows(); image++) apply(beside, row(image, block));
    fence();
  }

 private:
  void repeat(int64_t block) {
    norm_.repeat(NORMS * kRowsOfNorm, block * p_.channels_each(), p_.channels_in(block), call_.shape.channels, p_.folded());
  }
  bool joins_bits() const { return call_.mask != nullptr && !p_.whole_bytes(); }
  Span row(int64_t image, int64_t block) const {
    return joins_bits() ? p_.joined_row(image, block) : p_.row(image, block);
  }
  void first_of_columns(const Beside& beside, int64_t block, Rows<A>& sums) {
    A* rows = reduces() ? sums[0] : nullptr;
    if (reduces()) std::fill_n(rows, kSumRows * sums.stride(), A(0));
    if (writes_early_) {
      for (int64_t image = 0; image < p_.rows(); image++) sum_and_write(beside, row(image, block), rows, sums.stride());
    } else if (reduces()) {
      for (int64_t image = 0; image < p_.rows(); image += 8) {
        sum(beside, row(image, block), std::min<int64_t>(8, p_.rows() - image), rows, sums.stride());
      }
    }
    for (int64_t c = 0; reduces() && c < p_.channels_in(block); c++) {
      double of_channel[kSumRows] = {};
      for (int row = 0; row < kSumRows; row++) {
        of_channel[row] = sum_of(sums[row] + c * p_.positions(), p_.positions());
      }
      total_found(block * p_.channels_each() + c, of_channel);
    }
  }
  // Whether the second phase has anything to do.
  bool applies() const {
    const bool waiting = call_.dx || call_.dresidual || (call_.dz && !reads_dz_);
    return waiting && call_.phases != kSums && call_.phases != kLocal;
  }
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
  int64_t bytes(const Tensor& t) const { return t ? call_.shape.numel() * Elements(t).element_size() : 0; }
  // Whether outputs are stored past the caches: where those cannot hold all that the last phase moves. Huge pages, as
  // forward asks for, stall a network's backward: of a ResNet-50 step 330 to 720 ms for all nodes, without them 250.
  bool past() const {
    int64_t moved = 0;
    for (const Tensor* t : {&call_.dy, &call_.dy_fork, &call_.x, &call_.residual, &call_.dz, &call_.dx, &call_.dresidual}) {
      moved += bytes(*t);
    }
    return moved > call_.machine.shared_cache;
  }

  template <class Visit>
  void each_channel(int64_t block, Visit visit) const {
    for (int64_t c = 0; c < p_.channels_in(block); c++) visit(block * p_.channels_each() + c);
  }

  // A channel's sums of dz, and of dz times each input less its mean.
  void total_found(int64_t c, double* sums) {
    for (int i = 0; i < NORMS; i++) sums[1 + i] *= rstd(i, c);
    found(c, sums);
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
  Inputs inputs(const Beside& beside, Span s, bool is_dz) const {
    const Tensor none{nullptr, call_.dy.dtype};
    return {Elements(call_.x) + s.at,
            Elements(call_.residual) + s.at,
            Elements(is_dz ? call_.dz : call_.dy) + s.at,
            Elements(is_dz ? none : call_.dy_fork) + s.at,
            is_dz || beside.mask == nullptr ? nullptr : beside.mask + s.bits,
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
    const int64_t threads = call.shape.numel() < kGrain ? 1 : call.machine.threads;
    if constexpr (std::is_same_v<Partition, Columns>) {
      run_blocks(node, p, threads);
    } else {
      run(node, p, threads);
    }
  };
  call.norms == 1 ? with(std::integral_constant<int, 1>{}) : with(std::integral_constant<int, 2>{});
}

}  // namespace

template <>
void backward<KIND>(const BackwardCall& call) {
  if (call.shape.channels_last) return run_form<KIND, ChannelsLast>(call);
  if constexpr (KIND::kColumns) {
    if (Columns::suits(call.shape, KIND::Elements(call.x).element_size())) return run_form<KIND, Columns>(call);
  }
  run_form<KIND, Contiguous>(call);
}

}  // namespace resfused
