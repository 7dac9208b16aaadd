// Backward of activation(norm(x) + s), for the storage KIND and an ACTIVATION: its phases.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "columns.h"
#include "entry.h"
#include "gradient_loops.h"
#include "partition.h"
#include "storage.h"
#include "vectors.h"

namespace resfused {
namespace {

template <class Kind, class Partition, int NORMS>
class Backward {
  using A = typename Kind::A;
  using Elements = typename Kind::Elements;
  using Loops = GradientLoops<Kind, Partition, NORMS>;
  using Beside = typename Loops::Beside;
  static constexpr int kSumRows = Loops::kSumRows;
  static constexpr bool kColumns = std::is_same_v<Partition, Columns>;

 public:
  Backward(const BackwardCall& call, const Partition& p)
      : call_(with_room_for_dz(call, p)),
        p_(p),
        norm_(NORMS * kRowsOfNorm, p.columns()),
        partials_(reduces() && !kColumns ? kSumRows * p.parts() : 0, call.shape.channels),
        reads_dz_(call_.dz && call_.dz.dtype == call.dy.dtype &&
                  (call.phases == kInputs ||
                   (call.phases == kAll && (call.dy_fork || call_.dz.data == call.dx.data) && !p.channel_by_channel()))),
        writes_early_(call.phases == kLocal || (call.dz && call.phases == kSums) ||
                      (reads_dz_ && call.phases == kAll)),
        loops_(call_, reads_dz_, past()) {}

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
        p_.spans(part, block, [&](Span s) { loops_.sum_and_write(beside, s, rows, sums.stride()); });
      } else {
        p_.groups(part, [&](Span s, int64_t spans) { loops_.sum(beside, s, spans, rows, sums.stride()); });
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
        writes_early_ ? loops_.sum_and_write(beside, s, sums[s.c - first]) : loops_.sum(beside, s, sums[s.c - first]);
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
    p_.spans(part, block, [&](Span s) { loops_.apply(beside, s); });
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
    for (int64_t image = 0; applies() && image < p_.rows(); image++) loops_.apply(beside, row(image, block));
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
      for (int64_t image = 0; image < p_.rows(); image++) loops_.sum_and_write(beside, row(image, block), rows, sums.stride());
    } else if (reduces()) {
      for (int64_t image = 0; image < p_.rows(); image += 8) {
        loops_.sum(beside, row(image, block), std::min<int64_t>(8, p_.rows() - image), rows, sums.stride());
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
  // A slope that takes longer than memory does is computed once: dz waits in the place of dx, where no digit is lost.
  // silu's backward of 10 MB took 3.4 ms with two, with one 2.8.
  static BackwardCall with_room_for_dz(BackwardCall call, const Partition& p) {
    const bool exact = call.dx && call.dx.dtype == kFloat32 && call.dy.dtype == kFloat32 && sizeof(A) == sizeof(float);
    if (Loops::kSlow && exact && call.phases == kAll && !call.dz && !p.channel_by_channel()) call.dz = call.dx;
    return call;
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
      for (int row = 0; row < kSumRows; row++) {
        const bool is_kept = row == 0 || (row == 1 ? call_.x : call_.residual);
        stats_row(call_.sums, row)[c] = is_kept ? static_cast<A>(sums[row]) : A(0);
      }
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

  const BackwardCall call_;
  const Partition& p_;
  Rows<A> norm_, partials_;
  // Whether the last phase finds dz written: where that is less to read than two halves of dy.
  const bool reads_dz_;
  const bool writes_early_;
  const Loops loops_;
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

void backward(const BackwardCall& call) {
  if (call.shape.channels_last) return run_form<KIND, ChannelsLast>(call);
  if constexpr (KIND::kColumns) {
    if (Columns::suits(call.shape, KIND::Elements(call.x).element_size())) return run_form<KIND, Columns>(call);
  }
  run_form<KIND, Contiguous>(call);
}

}  // namespace
}  // namespace resfused

RESFUSED_API int64_t resfused_backward_size() { return sizeof(resfused::BackwardCall); }

RESFUSED_API int resfused_backward(const void* record) { return resfused::guarded(record, resfused::backward); }
