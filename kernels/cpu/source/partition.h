// How an activation is cut into parts and blocks of channels, and the order in which threads take them.
//
// Parts divide the values of a channel. They depend on the shape alone, and what they yield is merged in their order:
// the result is the same whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call.h"

namespace resfused {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Elements below which a second thread costs more than it does.
constexpr int64_t kGrain = 32768;
// Channels that are merged together, at most.
constexpr int64_t kChannels = 64;

// Neighbours in memory: elements [at, at + n) of channels from c on (channels_last), or all of channel c.
struct Span {
  int64_t at, n, bits, c;
};

// Rows of all channels; a part is some consecutive rows. Loops walk several rows as one long one, of 4 KB: eight such
// streams are read as fast as memory yields them, where eight rows of 512 bytes took 1.6 times as long. Slices of
// 64 to 256 channels, read again from the cache, took a prototype's forward 2.0 to 5.7 passes of a copy, whole rows read
// twice 0.8 to 2.6.
class ChannelsLast {
 public:
  // Whether the elements of a span are of one channel each, or all of the same.
  static constexpr bool kOverChannels = true;

  ChannelsLast(const Activation& a, const Machine&, int64_t element_bytes)
      : channels_(a.channels), rows_(a.values()), mask_row_(divide_up(a.channels, 8)) {
    // Enough parts for many threads, of enough rows to be worth a merge, short enough for the sums' precision.
    int64_t parts = 1;
    while (parts < 128 && parts * 2 * 64 <= rows_) parts *= 2;
    parts = std::max(parts, divide_up(rows_, 2048));
    each_ = round_up(divide_up(rows_, parts), 8);
    // Rows of a mask begin with a byte.
    const int64_t wanted = channels_ % 8 == 0 ? 4096 / (channels_ * element_bytes) : 1;
    folded_ = std::max<int64_t>(1, std::min({wanted, each_ / 32, 2048 / channels_}));
    each_ = round_up(each_, 8 * folded_);
  }
  int64_t parts() const { return divide_up(rows_, each_); }
  int64_t count(int64_t part) const { return std::min(each_, rows_ - part * each_); }
  int64_t channel_blocks() const { return divide_up(channels_, kChannels); }
  int64_t channels_each() const { return kChannels; }
  int64_t channels_in(int64_t block) const { return std::min(kChannels, channels_ - block * kChannels); }
  // Blocks of channels of a phase that walks parts.
  int64_t phase_blocks() const { return 1; }
  bool channel_by_channel() const { return false; }
  int64_t channels() const { return channels_; }
  int64_t first_row(int64_t part) const { return part * each_; }
  // Rows in a long one, and its elements.
  int64_t folded() const { return folded_; }
  int64_t columns() const { return folded_ * channels_; }
  int64_t mask_stride() const { return folded_ * mask_row_; }

  template <class Visit>
  void spans(int64_t part, int64_t, Visit visit) const {
    walk(part * each_, part * each_ + count(part), visit);
  }
  // The same by groups of long rows, of which it is given the first and how many they are.
  template <class Visit>
  void groups(int64_t part, Visit visit) const {
    const int64_t end = part * each_ + count(part), group = kGroup * folded_;
    int64_t m = part * each_;
    for (; m + group <= end; m += group) visit(row(m, folded_), kGroup);
    walk(m, end, [&](Span s) { visit(s, 1); });
  }

 private:
  static constexpr int64_t kGroup = 8;
  Span row(int64_t m, int64_t rows) const { return {m * channels_, rows * channels_, m * mask_row_, 0}; }
  template <class Visit>
  void walk(int64_t m, int64_t end, Visit visit) const {
    for (; m < end; m += folded_) visit(row(m, std::min(folded_, end - m)));
  }
  int64_t channels_, rows_, mask_row_, each_, folded_;
};

// Planes of one channel of one image; a part is the planes of some images, or a piece of one.
class Contiguous {
 public:
  static constexpr bool kOverChannels = false;

  Contiguous(const Activation& a, const Machine& machine, int64_t element_bytes)
      : images_(a.images), channels_(a.channels), positions_(a.positions), mask_row_(divide_up(a.positions, 8)) {
    pieces_ = divide_up(positions_, kPart);
    piece_ = round_up(divide_up(positions_, pieces_), 64);
    pieces_ = divide_up(positions_, piece_);
    images_each_ = std::max<int64_t>(1, kPart / positions_);
    // Runs of a page at least, but both phases of a block from the cache, and enough blocks for every thread.
    const int64_t fitting = machine.core_cache / 2 / std::max<int64_t>(1, a.values() * element_bytes);
    const int64_t most = std::min({kChannels, fitting, channels_ / (4 * machine.threads)});
    channels_each_ = std::max<int64_t>(1, std::min(most, divide_up(4096, positions_ * element_bytes)));
    const int64_t turns = divide_up(channel_blocks(), machine.threads);
    by_channel_ = channel_blocks() * 5 >= turns * machine.threads * 4;
  }
  int64_t parts() const { return divide_up(images_, images_each_) * pieces_; }
  int64_t count(int64_t part) const {
    const Range r = range(part);
    return (r.image_end - r.image) * (r.position_end - r.position);
  }
  int64_t channel_blocks() const { return divide_up(channels_, channels_each_); }
  int64_t channels_each() const { return channels_each_; }
  int64_t channels_in(int64_t block) const { return std::min(channels_each_, channels_ - block * channels_each_); }
  int64_t phase_blocks() const { return channel_blocks(); }
  int64_t columns() const { return channels_; }
  int64_t folded() const { return 1; }
  // Whether a thread takes a block of channels through all phases: its first reading leaves it in the thread's cache.
  bool channel_by_channel() const { return by_channel_; }

  template <class Visit>
  void spans(int64_t part, int64_t block, Visit visit) const {
    const Range r = range(part);
    const int64_t end = std::min(channels_, (block + 1) * channels_each_);
    for (int64_t n = r.image; n < r.image_end; n++) {
      for (int64_t c = block * channels_each_; c < end; c++) {
        const int64_t plane = n * channels_ + c;
        visit(Span{plane * positions_ + r.position, r.position_end - r.position, plane * mask_row_ + r.position / 8, c});
      }
    }
  }

 private:
  // Values of a channel in a part: half of a first-level cache in float.
  static constexpr int64_t kPart = 4096;
  struct Range {
    int64_t image, image_end, position, position_end;
  };
  Range range(int64_t part) const {
    const int64_t image = part / pieces_ * images_each_, position = part % pieces_ * piece_;
    return {image, std::min(images_, image + images_each_), position, std::min(positions_, position + piece_)};
  }
  int64_t images_, channels_, positions_, mask_row_, pieces_, piece_, images_each_, channels_each_;
  bool by_channel_;
};

// Runs a node whose blocks of channels are taken through all phases.
template <class Node, class Partition>
void run_blocks(Node& node, const Partition& p, int64_t threads) {
  const int64_t blocks = p.channel_blocks();
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) node.whole(block);
}

// Runs the phases of a node: prepare and merge by blocks of channels, first and second by parts of them.
template <class Node, class Partition>
void run(Node& node, const Partition& p, int64_t threads) {
  const int64_t parts = p.parts(), blocks = p.channel_blocks(), phase_blocks = p.phase_blocks();
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  if (p.channel_by_channel()) {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      node.prepare(block);
      for (int64_t part = 0; part < parts; part++) node.first(part, block);
      node.merge(block);
      for (int64_t part = 0; part < parts; part++) node.second(part, block);
    }
  } else {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) node.prepare(block);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts * phase_blocks; task++) node.first(task / phase_blocks, task % phase_blocks);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) node.merge(block);
    // Forwards again: backwards, from what the first phase has left in the cache, lost 10 to 50 %.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts * phase_blocks; task++) node.second(task / phase_blocks, task % phase_blocks);
  }
}

}  // namespace resfused
