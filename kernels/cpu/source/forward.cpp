// Forward of activation(norm(x) + s), for the storage KIND and an ACTIVATION: statistics, their merge, the rest.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "activations/activated.h"
#include "columns.h"
#include "entry.h"
#include "pages.h"
#include "partition.h"
#include "statistics.h"
#include "storage.h"
#include "vectors.h"

namespace resfused {
namespace {

template <class Kind, class Partition, int NORMS>
class Forward {
  using A = typename Kind::A;
  using Elements = typename Kind::Elements;
  // Mean and M2 of each norm.
  static constexpr int64_t kPartialRows = 2 * NORMS;
  static constexpr bool kColumns = std::is_same_v<Partition, Columns>;

 public:
  Forward(const ForwardCall& call, const Partition& p)
      : call_(call),
        p_(p),
        norm_(NORMS * kRowsOfNorm, p.columns()),
        partials_(takes_statistics() && !kColumns ? kPartialRows * p.parts() : 0, call.shape.channels),
        past_(call.statistics != kMoments && !takes_pages(call.y.data, bytes(call.y)) && moved() > call.machine.shared_cache) {}

  __attribute__((noinline)) void prepare(int64_t block) {
    if (takes_statistics()) return;
    each_norm(block, [&](int i, int64_t c) { given(i, c); });
    repeat(block);
  }

  __attribute__((noinline)) void first(int64_t part, int64_t block) {
    if (!takes_statistics()) return;
    for (int i = 0; i < NORMS; i++) {
      const int64_t row = part * kPartialRows + 2 * i;
      moments(p_, part, block, Elements(i == 0 ? call_.x : call_.residual), partials_[row],
              partials_[row + 1]);
    }
  }

  __attribute__((noinline)) void merge(int64_t block) {
    if (!takes_statistics()) return;
    double mean[kChannels], m2[kChannels];
    for (int i = 0; i < NORMS; i++) {
      merge_moments(p_, block, partials_, 2 * i, kPartialRows, mean, m2);
      for (int64_t c = 0; c < p_.channels_in(block); c++) found(i, block * p_.channels_each() + c, mean[c], m2[c]);
    }
    repeat(block);
  }

  __attribute__((noinline)) void second(int64_t part, int64_t block) {
    if (call_.statistics == kMoments) return;
    const Elements x(call_.x), residual(call_.residual), y(call_.y);
    p_.spans(part, block, [&](Span s) {
      normalise(x + s.at, residual + s.at, y + s.at, call_.mask == nullptr ? nullptr : call_.mask + s.bits, s.n,
                NormPacks<A, Partition>(norm_, s.c));
    });
    fence();
  }

  // All phases of a block of columns.
  void whole(int64_t block) {
    Rows<A> rows(NORMS * kRowsOfNorm, p_.channels_in(block) * p_.positions());
    prepare(block);
    for (int i = 0; takes_statistics() && i < NORMS; i++) columns_moments(block, i, rows);
    if (call_.statistics == kMoments) return;
    for (int row = 0; row < NORMS * kRowsOfNorm; row++) {
      if (row % kRowsOfNorm <= kShift) p_.expand(norm_[row], block, rows[row]);
    }
    const Elements x(call_.x), residual(call_.residual), y(call_.y);
    std::vector<uint8_t> bits(p_.mask_stride());
    const bool parts_bits = call_.mask != nullptr && !p_.whole_bytes();
    for (int64_t image = 0; image < p_.rows(); image++) {
      const Span s = p_.row(image, block);
      uint8_t* mask = parts_bits ? bits.data() : call_.mask == nullptr ? nullptr : call_.mask + s.bits;
      normalise(x + s.at, residual + s.at, y + s.at, mask, s.n, NormPacks<A, Partition>(rows, 0));
      if (parts_bits) p_.part_bits(mask, image, block, call_.mask);
    }
    fence();
  }

 private:
  void repeat(int64_t block) {
    norm_.repeat(NORMS * kRowsOfNorm, block * p_.channels_each(), p_.channels_in(block), call_.shape.channels, p_.folded());
  }

  // The statistics of norm i, with its rows as room for those of the columns.
  void columns_moments(int64_t block, int i, Rows<A>& rows) {
    A *mean = rows[i * kRowsOfNorm], *m2 = rows[i * kRowsOfNorm + 1];
    const Span s = p_.row(0, block);
    moments(Elements(i == 0 ? call_.x : call_.residual) + s.at, p_.stride(), s.n, p_.rows(), mean, m2);
    for (int64_t c = 0; c < p_.channels_in(block); c++) {
      double of_channel[2];
      merge_columns(mean + c * p_.positions(), m2 + c * p_.positions(), p_.positions(), p_.rows(), of_channel, of_channel + 1);
      found(i, block * p_.channels_each() + c, of_channel[0], of_channel[1]);
    }
  }

  bool takes_statistics() const { return call_.statistics == kFromBatch || call_.statistics == kMoments; }
  A* stats(int64_t row) const { return reinterpret_cast<A*>(call_.stats) + row * call_.shape.channels; }
  const Norm& norm(int i) const { return i == 0 ? call_.norm : call_.residual_norm; }
  int64_t bytes(const Tensor& t) const { return t ? call_.shape.numel() * Elements(t).element_size() : 0; }
  // All that the second phase moves.
  int64_t moved() const { return bytes(call_.x) + bytes(call_.residual) + bytes(call_.y); }

  template <class Visit>
  void each_norm(int64_t block, Visit visit) const {
    for (int64_t c = 0; c < p_.channels_in(block); c++) {
      for (int i = 0; i < NORMS; i++) visit(i, block * p_.channels_each() + c);
    }
  }

  // The rows of norm i from statistics of others: a collective's, or the running ones.
  void given(int i, int64_t c) {
    const Norm& n = norm(i);
    if (call_.statistics == kGiven) {
      fill(norm_, i, c, stats(2 * i)[c], stats(2 * i + 1)[c], n);
    } else {
      fill(norm_, i, c, read<A>(n.running_mean, c), rstd_of<A>(read<A>(n.running_var, c), n.eps), n);
    }
  }

  // The rows of norm i from statistics of this batch, which go into the running ones.
  void found(int i, int64_t c, double mean, double m2) {
    const Norm& n = norm(i);
    const double values = static_cast<double>(call_.shape.values());
    stats(2 * i)[c] = static_cast<A>(mean);
    if (call_.statistics == kMoments) {
      stats(2 * i + 1)[c] = static_cast<A>(m2);
      return;
    }
    stats(2 * i + 1)[c] = rstd_of<A>(m2 / values, n.eps);
    fill(norm_, i, c, stats(2 * i)[c], stats(2 * i + 1)[c], n);
    update(n.running_mean, c, mean, n.momentum);
    update(n.running_var, c, m2 / (values - 1), n.momentum);
  }

  static void update(const Tensor& running, int64_t c, double value, double momentum) {
    if (running) write<A>(running, c, (1 - momentum) * read<A>(running, c) + momentum * value);
  }

  template <class Norms>
  void normalise(Elements x, Elements residual, Elements y, uint8_t* mask, int64_t n, const Norms& norms) const {
    const bool past = past_ && y.aligned();
    const Activated<A, ACTIVATION> activation(call_.activation);
    walk<A>(n, [&](int64_t i, auto some) INLINED {
      Pack<A> z = norms.affine(0, x.load(i, some) - norms.get(0, kMean, i), i);
      if constexpr (NORMS == 1) {
        if (residual) z = z + residual.load(i, some);
      } else {
        z = z + norms.affine(1, residual.load(i, some) - norms.get(1, kMean, i), i);
      }
      y.store(i, some, activation.value(z), past);
      if (mask != nullptr) store_bits<A>(mask, i, some, bits<A>(activation.on(z)));
    });
  }

  const ForwardCall& call_;
  const Partition& p_;
  Rows<A> norm_, partials_;
  const bool past_;
};

template <class Kind, class Partition>
void run_form(const ForwardCall& call) {
  const Partition p(call.shape, call.machine, typename Kind::Elements(call.x).element_size());
  const auto with = [&](auto norms) {
    Forward<Kind, Partition, decltype(norms)::value> node(call, p);
    const int64_t threads = call.shape.numel() < kGrain ? 1 : call.machine.threads;
    if constexpr (std::is_same_v<Partition, Columns>) {
      run_blocks(node, p, threads);
    } else {
      run(node, p, threads);
    }
  };
  call.norms == 1 ? with(std::integral_constant<int, 1>{}) : with(std::integral_constant<int, 2>{});
}

void forward(const ForwardCall& call) {
  if (call.shape.channels_last) return run_form<KIND, ChannelsLast>(call);
  if constexpr (KIND::kColumns) {
    if (Columns::suits(call.shape, KIND::Elements(call.x).element_size())) return run_form<KIND, Columns>(call);
  }
  run_form<KIND, Contiguous>(call);
}

}  // namespace
}  // namespace resfused

RESFUSED_API int64_t resfused_forward_size() { return sizeof(resfused::ForwardCall); }

RESFUSED_API int resfused_forward(const void* record) { return resfused::guarded(record, resfused::forward); }
