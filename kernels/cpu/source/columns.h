// Contiguous activations of small planes: some neighbouring channels of an image are one row, of which every element
// is a column, and the images are its rows. What is known of a channel stands in as many columns as it has positions.
//
// Planes of 7x7 and 14x14 begin anywhere in a line of the cache and end within a pack; rows of whole lines do neither.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "partition.h"

namespace resfused {

// Each thread takes blocks of channels through all phases, whose second reading finds them in its cache.
class Columns {
 public:
  static constexpr bool kOverChannels = true;

  // By the shape alone, as it decides in which order sums are taken: images enough for the columns to pay, few enough
  // for the sums' precision; planes that do not begin on lines, or are short.
  static bool suits(const Activation& a, int64_t element_bytes) {
    const bool on_lines = a.positions * element_bytes % 64 == 0;
    return a.images >= 4 && a.images <= 2048 && (a.positions < 256 || (a.positions <= 1024 && !on_lines));
  }

  Columns(const Activation& a, const Machine& machine, int64_t element_bytes)
      : images_(a.images), channels_(a.channels), positions_(a.positions), plane_bytes_(divide_up(a.positions, 8)) {
    // Whole lines, 3 KB of them or more, of which all images fit in half the cache of a core, and a block a thread.
    const int64_t lines = 64 / std::gcd<int64_t>(64, positions_ * element_bytes);
    const int64_t wanted = divide_up(3072, positions_ * element_bytes);
    const int64_t fitting = machine.core_cache / 2 / (images_ * positions_ * element_bytes);
    const int64_t most = std::min({fitting, divide_up(channels_, machine.threads), kChannels});
    channels_each_ = std::max<int64_t>(1, std::min(wanted, most));
    channels_each_ = std::min(round_up(channels_each_, lines), channels_);
  }
  int64_t parts() const { return 1; }
  int64_t rows() const { return images_; }
  int64_t positions() const { return positions_; }
  int64_t channel_blocks() const { return divide_up(channels_, channels_each_); }
  int64_t channels_each() const { return channels_each_; }
  int64_t channels_in(int64_t block) const { return std::min(channels_each_, channels_ - block * channels_each_); }
  bool channel_by_channel() const { return true; }
  int64_t columns() const { return channels_; }
  int64_t folded() const { return 1; }
  int64_t stride() const { return channels_ * positions_; }
  // Bytes of a row's mask, bit beside bit, with room for the word that is written last.
  int64_t mask_stride() const { return divide_up(channels_each_ * positions_, 8) + 8; }

  // Row ``image`` of a block; its bits are those of planes of whole bytes.
  Span row(int64_t image, int64_t block) const {
    const int64_t plane = image * channels_ + block * channels_each_;
    return {plane * positions_, channels_in(block) * positions_, plane * plane_bytes_, 0};
  }
  // The same, where the bits of all rows were joined.
  Span joined_row(int64_t image, int64_t block) const {
    Span s = row(image, block);
    s.bits = image * mask_stride();
    return s;
  }

  // Whether planes of a mask, each of which begins with a byte, lie bit beside bit as they are.
  bool whole_bytes() const { return positions_ % 8 == 0; }

  // A row's bits to the planes of a mask, 56 at a time.
  void part_bits(const uint8_t* bits, int64_t image, int64_t block, uint8_t* mask) const {
    mask += (image * channels_ + block * channels_each_) * plane_bytes_;
    uint8_t* const end = mask + channels_in(block) * plane_bytes_;
    for (int64_t c = 0; c < channels_in(block); c++) {
      for (int64_t p = 0; p < positions_; p += 56) {
        const int64_t at = c * positions_ + p, some = std::min<int64_t>(56, positions_ - p);
        uint64_t word;
        std::memcpy(&word, bits + at / 8, 8);
        word = word >> at % 8 & ((uint64_t{1} << some) - 1);
        // What stands beyond the plane is written again, by the next one; beyond the last one nothing is.
        copy_word(mask, &word, end - mask, some);
        mask += divide_up(some, 8);
      }
    }
  }

  // The planes of a mask to a row's bits.
  void join_bits(const uint8_t* mask, int64_t image, int64_t block, uint8_t* bits) const {
    const uint8_t* const end = mask + images_ * channels_ * plane_bytes_;
    mask += (image * channels_ + block * channels_each_) * plane_bytes_;
    uint64_t waiting = 0;
    int64_t held = 0;
    for (int64_t c = 0; c < channels_in(block); c++) {
      for (int64_t p = 0; p < positions_; p += 56) {
        const int64_t some = std::min<int64_t>(56, positions_ - p);
        uint64_t word = 0;
        copy_word(&word, mask, end - mask, some);
        mask += divide_up(some, 8);
        waiting |= (word & ((uint64_t{1} << some) - 1)) << held;
        held += some;
        std::memcpy(bits, &waiting, 8);
        bits += held / 8;
        waiting = held >= 64 ? 0 : waiting >> held / 8 * 8;
        held %= 8;
      }
    }
  }

  // What is known of a block's channels, from the first on, into its columns.
  template <class A>
  void expand(const A* of_channels, int64_t block, A* columns) const {
    for (int64_t c = 0; c < channels_in(block); c++) {
      columns = std::fill_n(columns, positions_, of_channels[block * channels_each_ + c]);
    }
  }

 private:
  // Eight bytes where there is ``room``, else those of ``some`` bits.
  static void copy_word(void* to, const void* from, int64_t room, int64_t some) {
    if (room >= 8) {
      std::memcpy(to, from, 8);
    } else {
      std::memcpy(to, from, static_cast<size_t>(divide_up(some, 8)));
    }
  }
  int64_t images_, channels_, positions_, plane_bytes_, channels_each_;
};

}  // namespace resfused
