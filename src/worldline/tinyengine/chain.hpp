// Chains of stages, fed row by row: the frame is never there as a whole.
#ifndef TINYENGINE_CHAIN_HPP
#define TINYENGINE_CHAIN_HPP

#include "stage.hpp"

namespace tinyengine {

constexpr size_t kMaxStages = 16;

enum class End : uint32_t {
  rows = 1,     // rows of the last grid, as they are
  pixels = 2,   // rows of pictures: 12 channels spread over 2 x 2 pixels, each value looked up
  flatten = 3,  // one matrix over the whole grid
  average = 4,  // every channel's mean over the grid, scaled, then a matrix
};

enum class Schedule : uint32_t {
  rows = 1,   // every row goes down the chain as soon as it can be made
  tiles = 2,  // the picture is kept; the first stages run tile by tile, the others one after the other
};

// As it lies in a program.
struct Chain {
  uint32_t num_stages, stages_at;
  End end;
  Schedule schedule;
  uint32_t num_tiled;                // of the stages; the last is never among them
  uint32_t tile_rows, tile_columns;  // of the last tiled stage's grid
  uint32_t scratch_at;               // in the arena: what `stage_row` wants
  uint32_t piece_at;                 // in the arena: kBlock pixels of the last grid, or a row of it and one of pixels
  uint32_t sums_at;                  // in the arena: int32 for every output, or channel
  uint32_t num_outputs;              // of the matrix
  uint32_t weights_at, by_at;        // of the matrix
  uint32_t shades_at;                // pixels: 256 bytes
  Finish out;                        // of the matrix
  Channel mean;                      // average: how means are scaled (any shift)
  int32_t mean_zero_in, mean_zero_out;
};

// Rows from y0 to before y1, columns from x0 to before x1.
struct Range {
  int32_t y0, y1, x0, x1;

  void clip(uint32_t rows, uint32_t columns) {
    y0 = clamp(y0, int32_t{0}, static_cast<int32_t>(rows));
    y1 = clamp(y1, y0, static_cast<int32_t>(rows));
    x0 = clamp(x0, int32_t{0}, static_cast<int32_t>(columns));
    x1 = clamp(x1, x0, static_cast<int32_t>(columns));
  }
};

// What a stage reads for a part of its grid.
inline Range needed(const Stage& s, const Range& out) {
  const int32_t stride = static_cast<int32_t>(s.stride);
  const int32_t top = static_cast<int32_t>(s.top);
  const int32_t left = static_cast<int32_t>(s.left);
  const int32_t reach = static_cast<int32_t>(s.kernel) - 1;
  Range in = {(out.y0 * stride - top) >> s.upsample, (((out.y1 - 1) * stride - top + reach) >> s.upsample) + 1,
              (out.x0 * stride - left) >> s.upsample, (((out.x1 - 1) * stride - left + reach) >> s.upsample) + 1};
  in.clip(s.in_rows, s.in_columns);
  return in;
}

// Called with each finished row of an `End::rows` or `End::pixels` chain.
using Emit = void (*)(void* user, uint32_t row, const uint8_t* bytes, size_t size_bytes);

// How far each stage has come. Rows go down the chain as soon as they can be made.
class RowStream {
 public:
  void bind(const uint8_t* program, const Chain* chain, uint8_t* arena) {
    program_ = program;
    chain_ = chain;
    arena_ = arena;
    restart();
  }

  // Forget the picture that was begun.
  void restart() {
    for (size_t i = 0; i < chain_->num_stages; ++i) {
      received_[i] = 0;
      made_[i] = 0;
    }
    if (chain_->end == End::flatten || chain_->end == End::average) {
      const Channel* by = reinterpret_cast<const Channel*>(program_ + chain_->by_at);
      const size_t count = chain_->end == End::flatten ? chain_->num_outputs : last().channels;
      for (size_t o = 0; o < count; ++o) {
        sums()[o] = chain_->end == End::flatten ? by[o].bias : 0;
      }
    }
  }

  const Stage& first() const { return stage(0); }
  const Stage& last() const { return stage(chain_->num_stages - 1); }

  // Where the next input row is to be put before `pushed`.
  int8_t* next_row() { return slot(0, received_[0]); }

  bool full() const { return received_[0] == first().in_rows; }
  bool finished() const { return made_[chain_->num_stages - 1] == last().rows; }

  // Take note of the row put at `next_row`, and make all that it allows.
  void pushed(Emit emit, void* user) {
    ++received_[0];
    if (chain_->schedule == Schedule::tiles) {
      if (full()) {
        run_tiles(emit, user);
      }
      return;
    }
    for (size_t i = 0;;) {
      if (!ready(i)) {
        if (i == 0) {
          return;
        }
        --i;
      } else if (i + 1 < chain_->num_stages) {
        make(i, 0, static_cast<int32_t>(stage(i).columns), slot(i + 1, received_[i + 1]));
        ++made_[i];
        ++received_[++i];
      } else {
        finish_row(emit, user);
        ++made_[i];
      }
    }
  }

  // The matrix at the end, once all rows are in: `num_outputs` values, each between `out.low` and `out.high`.
  template <class T>
  void outputs(T* to) {
    const Channel* by = reinterpret_cast<const Channel*>(program_ + chain_->by_at);
    if (chain_->end == End::flatten) {
      for (size_t o = 0; o < chain_->num_outputs; ++o) {
        to[o] = static_cast<T>(finish(sums()[o], by[o], chain_->out));
      }
      return;
    }
    const Channel& mean = chain_->mean;
    const size_t channels = last().channels;
    const int32_t pixels = static_cast<int32_t>(last().rows * last().columns);
    int8_t* means = reinterpret_cast<int8_t*>(arena_ + chain_->piece_at);
    for (size_t c = 0; c < channels; ++c) {
      const int32_t value = average(sums()[c], pixels) - chain_->mean_zero_in;
      const int32_t scaled = requantise_any(value, mean.multiplier, mean.shift) + chain_->mean_zero_out;
      means[c] = static_cast<int8_t>(clamp<int32_t>(scaled, -128, 127));
    }
    const int8_t* weights = reinterpret_cast<const int8_t*>(program_ + chain_->weights_at);
    const size_t stride = padded(channels, kRowAlign);
    for (size_t o = 0; o < chain_->num_outputs; ++o) {
      const int32_t acc = by[o].bias + dot_narrow(means, weights + o * stride, channels);
      to[o] = static_cast<T>(finish(acc, by[o], chain_->out));
    }
  }

 private:
  const Stage& stage(size_t i) const { return reinterpret_cast<const Stage*>(program_ + chain_->stages_at)[i]; }

  int32_t* sums() { return reinterpret_cast<int32_t*>(arena_ + chain_->sums_at); }

  int8_t* slot(size_t i, uint32_t row) {
    const Stage& s = stage(i);
    return reinterpret_cast<int8_t*>(arena_ + s.ring_at) + (row % s.ring_rows) * s.in_columns * s.in_channels;
  }

  bool ready(size_t i) const {
    const Stage& s = stage(i);
    if (made_[i] == s.rows) {
      return false;
    }
    const int32_t bottom = static_cast<int32_t>((made_[i] * s.stride + s.kernel - 1)) - static_cast<int32_t>(s.top);
    const int32_t wanted = bottom < 0 ? 0 : bottom >> s.upsample;
    const int32_t last_row = static_cast<int32_t>(s.in_rows) - 1;
    return static_cast<int32_t>(received_[i]) > (wanted < last_row ? wanted : last_row);
  }

  void make(size_t i, int32_t begin, int32_t end, int8_t* out) {
    const Stage& s = stage(i);
    Window window;
    window.base = 0;
    const int32_t top = static_cast<int32_t>(made_[i] * s.stride) - static_cast<int32_t>(s.top);
    for (size_t row = 0; row < s.kernel; ++row) {
      const int32_t y = top + static_cast<int32_t>(row);
      const bool inside = y >= 0 && y < static_cast<int32_t>(s.in_rows << s.upsample);
      window.rows[row] = inside ? slot(i, static_cast<uint32_t>(y >> s.upsample)) : nullptr;
    }
    stage_row(s, program_, window, begin, end, reinterpret_cast<Lane*>(arena_ + chain_->scratch_at), out);
  }

  // Not inlined: its frame is none of those who stream.
  [[gnu::noinline]] void run_tiles(Emit emit, void* user) {
    const size_t num_tiled = chain_->num_tiled;
    if (num_tiled > 0) {
      const Stage& joint = stage(num_tiled - 1);
      for (uint32_t y = 0; y < joint.rows; y += chain_->tile_rows) {
        for (uint32_t x = 0; x < joint.columns; x += chain_->tile_columns) {
          run_tile(y, x);
        }
      }
    }
    const size_t last_stage = chain_->num_stages - 1;
    for (size_t i = num_tiled; i < last_stage; ++i) {
      const Stage& s = stage(i);
      for (; made_[i] < s.rows; ++made_[i]) {
        make(i, 0, static_cast<int32_t>(s.columns), slot(i + 1, made_[i]));
      }
    }
    for (; made_[last_stage] < last().rows; ++made_[last_stage]) {
      finish_row(emit, user);
    }
  }

  // One tile of the last tiled stage's grid, and of every grid before what it needs.
  void run_tile(uint32_t y, uint32_t x) {
    const size_t num_tiled = chain_->num_tiled;
    Range out[kMaxStages];
    const Stage& joint = stage(num_tiled - 1);
    out[num_tiled - 1] = {static_cast<int32_t>(y), static_cast<int32_t>(y + chain_->tile_rows), static_cast<int32_t>(x),
                          static_cast<int32_t>(x + chain_->tile_columns)};
    out[num_tiled - 1].clip(joint.rows, joint.columns);
    for (size_t i = num_tiled - 1; i > 0; --i) {
      out[i - 1] = needed(stage(i), out[i]);
    }
    for (size_t i = 0; i < num_tiled; ++i) {
      const Stage& s = stage(i);
      const Range in =
          i == 0 ? Range{0, static_cast<int32_t>(s.in_rows), 0, static_cast<int32_t>(s.in_columns)} : out[i - 1];
      const size_t pitch = static_cast<size_t>(in.x1 - in.x0) * s.in_channels;
      const int8_t* from = reinterpret_cast<const int8_t*>(arena_ + s.ring_at);
      int8_t* to = reinterpret_cast<int8_t*>(arena_ + stage(i + 1).ring_at);
      size_t out_pitch = static_cast<size_t>(out[i].x1 - out[i].x0) * s.channels;
      if (i + 1 == num_tiled) {
        out_pitch = static_cast<size_t>(s.columns) * s.channels;
        to += static_cast<size_t>(out[i].y0) * out_pitch + static_cast<size_t>(out[i].x0) * s.channels;
      }
      for (int32_t row = out[i].y0; row < out[i].y1; ++row, to += out_pitch) {
        Window window;
        window.base = in.x0;
        for (size_t k = 0; k < s.kernel; ++k) {
          const int32_t at =
              row * static_cast<int32_t>(s.stride) - static_cast<int32_t>(s.top) + static_cast<int32_t>(k);
          const bool inside = at >= 0 && at < static_cast<int32_t>(s.in_rows << s.upsample);
          window.rows[k] = inside ? from + static_cast<size_t>((at >> s.upsample) - in.y0) * pitch : nullptr;
        }
        stage_row(s, program_, window, out[i].x0, out[i].x1, reinterpret_cast<Lane*>(arena_ + chain_->scratch_at), to);
      }
    }
  }

  [[gnu::always_inline]] void finish_row(Emit emit, void* user) {
    const size_t i = chain_->num_stages - 1;
    const Stage& s = stage(i);
    int8_t* piece = reinterpret_cast<int8_t*>(arena_ + chain_->piece_at);
    const int32_t columns = static_cast<int32_t>(s.columns);
    if (chain_->end == End::rows || chain_->end == End::pixels) {
      make(i, 0, columns, piece);
      if (chain_->end == End::rows) {
        emit(user, made_[i], reinterpret_cast<uint8_t*>(piece), s.columns * s.channels);
      } else {
        emit_pixels(piece, emit, user);
      }
      return;
    }
    for (int32_t x = 0; x < columns; x += static_cast<int32_t>(kBlock)) {
      const int32_t end = x + static_cast<int32_t>(kBlock) < columns ? x + static_cast<int32_t>(kBlock) : columns;
      make(i, x, end, piece);
      const size_t count = static_cast<size_t>(end - x) * s.channels;
      if (chain_->end == End::flatten) {
        const size_t stride = padded(s.rows * s.columns * s.channels, kRowAlign);
        const int8_t* weights = reinterpret_cast<const int8_t*>(program_ + chain_->weights_at) +
                                (made_[i] * s.columns + static_cast<size_t>(x)) * s.channels;
        for (size_t o = 0; o < chain_->num_outputs; ++o) {
          sums()[o] += dot_narrow(piece, weights + o * stride, count);
        }
      } else {
        for (size_t p = 0; p < count; p += s.channels) {
          for (size_t c = 0; c < s.channels; ++c) {
            sums()[c] += piece[p + c];
          }
        }
      }
    }
  }

  void emit_pixels(const int8_t* row, Emit emit, void* user) {
    const Stage& s = last();
    const uint8_t* shades = program_ + chain_->shades_at;
    uint8_t* line = arena_ + chain_->piece_at + padded(s.columns * s.channels, 4);
    const uint32_t y = made_[chain_->num_stages - 1];
    for (size_t half = 0; half < 2; ++half) {
      uint8_t* to = line;
      for (size_t x = 0; x < s.columns; ++x) {
        for (size_t side = 0; side < 2; ++side) {
          for (size_t colour = 0; colour < 3; ++colour) {
            *to++ = shades[static_cast<size_t>(row[x * 12 + colour * 4 + half * 2 + side] + 128)];
          }
        }
      }
      emit(user, 2 * y + static_cast<uint32_t>(half), line, s.columns * 6);
    }
  }

  const uint8_t* program_ = nullptr;
  const Chain* chain_ = nullptr;
  uint8_t* arena_ = nullptr;
  uint16_t received_[kMaxStages] = {};
  uint16_t made_[kMaxStages] = {};
};

}  // namespace tinyengine

#endif
