// A program is read where it lies, in flash or in a file's memory, and is checked as a whole before anything runs.
#ifndef TINYENGINE_PROGRAM_HPP
#define TINYENGINE_PROGRAM_HPP

#include "chain.hpp"
#include "predictor.hpp"

namespace tinyengine {

constexpr uint32_t kVersion = 1;

// The first bytes of a program. A place of 0 means that the program lacks that part.
struct Header {
  char magic[8];  // worldtin
  uint32_t version;
  uint32_t size_bytes;
  uint32_t checksum;  // CRC-32 of everything behind this header
  uint32_t arena_bytes;
  uint32_t encoder_at, predictor_at, drawing_at, decoder_at, gauge_at;
  uint32_t reserved[5];
};

inline uint32_t crc32(const uint8_t* bytes, size_t n) {
  // four bits at a time: a table that fits into flash without being felt
  static constexpr uint32_t kTable[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
                                          0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                          0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
  uint32_t crc = 0xffffffff;
  for (size_t i = 0; i < n; ++i) {
    crc = kTable[(crc ^ bytes[i]) & 15] ^ (crc >> 4);
    crc = kTable[(crc ^ static_cast<uint32_t>(bytes[i] >> 4)) & 15] ^ (crc >> 4);
  }
  return ~crc;
}

// Checks that no size or place in a program leads outside it or its arena, and that no accumulator can overflow.
class Checker {
 public:
  Checker(const uint8_t* program, uint32_t size, uint32_t arena) : program_(program), size_(size), arena_(arena) {}

  template <class T>
  const T* record(uint32_t at, uint64_t count = 1) const {
    const bool fits =
        at >= sizeof(Header) && at % 4 == 0 && count * sizeof(T) <= size_ && at <= size_ - count * sizeof(T);
    return fits ? reinterpret_cast<const T*>(program_ + at) : nullptr;
  }

  bool arena(uint32_t at, uint64_t count, uint32_t align) const {
    return at % align == 0 && count <= arena_ && at <= arena_ - count;
  }

  // A bias that leaves room for `depth` products of int8.
  bool channels(uint32_t at, uint32_t count, uint64_t depth) const {
    const Channel* by = record<Channel>(at, count);
    if (by == nullptr || depth > kMaxDepth) {
      return false;
    }
    const int64_t room = (int64_t{1} << 30) - static_cast<int64_t>(depth) * 128 * 128;
    for (uint32_t o = 0; o < count; ++o) {
      const bool scale = by[o].multiplier >= 0 && by[o].shift >= 1 && by[o].shift <= 31;
      if (!scale || by[o].bias >= room || -static_cast<int64_t>(by[o].bias) >= room) {
        return false;
      }
    }
    return true;
  }

  bool matrix(uint32_t weights_at, uint32_t by_at, uint32_t rows, uint64_t depth) const {
    return within(rows, 1, kMaxSide * kMaxSide) && depth <= kMaxDepth &&
           record<int8_t>(weights_at, rows * static_cast<uint64_t>(padded(static_cast<size_t>(depth), kRowAlign))) !=
               nullptr &&
           channels(by_at, rows, depth);
  }

  static bool within(uint32_t x, uint32_t low, uint32_t high) { return x >= low && x <= high; }

  static bool bytes(const Finish& f) {
    return f.low >= -128 && f.high <= 127 && f.low <= f.high && f.zero >= -128 && f.zero <= 127;
  }

  // Sizes, weights and scales of a stage.
  bool sound(const Stage& s) const {
    const bool conv = s.kind == Kind::conv || s.kind == Kind::separable;
    const bool deep = s.kind == Kind::depthwise || s.kind == Kind::separable;
    const bool pool = s.kind == Kind::average_pool || s.kind == Kind::max_pool;
    if (!(conv || deep || pool) || !within(s.kernel, 1, kMaxKernel) || !within(s.stride, 1, 16) || s.top >= s.kernel ||
        s.left >= s.kernel || s.upsample > (s.kind == Kind::conv ? 1u : 0u) || (pool && (s.top != 0 || s.left != 0)) ||
        s.zero_in < -128 || s.zero_in > 127) {
      return false;
    }
    const uint32_t sides[] = {s.in_rows, s.in_columns, s.in_channels, s.rows, s.columns, s.channels};
    for (uint32_t side : sides) {
      if (!within(side, 1, kMaxSide)) {
        return false;
      }
    }
    const uint32_t high = s.in_rows << s.upsample;
    const uint32_t wide = s.in_columns << s.upsample;
    // the last row and column begin inside; those of pools end there too
    const uint32_t least = pool ? s.kernel : 1;
    if ((s.rows - 1) * s.stride + least > high + s.top || (s.columns - 1) * s.stride + least > wide + s.left) {
      return false;
    }
    if (!conv && s.channels != s.in_channels) {
      return false;
    }
    if (deep) {
      const uint32_t taps = s.kernel * s.kernel;
      if (record<int16_t>(s.middle_weights_at, uint64_t{taps} * s.in_channels) == nullptr || !bytes(s.middle) ||
          !channels(s.middle_by_at, s.in_channels, taps) ||
          !eights(s.middle_weights_at, uint64_t{taps} * s.in_channels)) {
        return false;
      }
    }
    if (conv) {
      const uint32_t area = s.kind == Kind::conv ? s.kernel * s.kernel : 1;
      if (s.depth != area * s.in_channels || !bytes(s.out) || !matrix(s.weights_at, s.by_at, s.channels, s.depth)) {
        return false;
      }
    }
    return record<int8_t>(s.padding_at, s.in_channels) != nullptr;
  }

  // Room for what is kept of a stage's input.
  bool kept(const Stage& s, uint32_t rows, uint32_t columns) const {
    return s.ring_rows >= rows && s.ring_rows <= kMaxSide &&
           arena(s.ring_at, uint64_t{s.ring_rows} * columns * s.in_channels, 1);
  }

  // The most input rows (or columns) that `out` of a stage's rows need.
  static uint32_t reach(const Stage& s, uint64_t out, uint32_t in) {
    const uint64_t most = ((out - 1) * s.stride + s.kernel - 1) / (1u << s.upsample) + 2;
    const uint64_t exact = (out - 1) * s.stride + s.kernel;
    const uint64_t wanted = s.upsample != 0 ? most : exact;
    return wanted < in ? static_cast<uint32_t>(wanted) : in;
  }

  bool chain(uint32_t at) const {
    const Chain* c = record<Chain>(at);
    if (c == nullptr || !within(c->num_stages, 1, kMaxStages)) {
      return false;
    }
    const Stage* stages = record<Stage>(c->stages_at, c->num_stages);
    if (stages == nullptr) {
      return false;
    }
    const bool tiles = c->schedule == Schedule::tiles;
    if ((!tiles && c->schedule != Schedule::rows) || c->num_tiled >= c->num_stages ||
        (tiles && (!within(c->tile_rows, 1, kMaxSide) || !within(c->tile_columns, 1, kMaxSide)))) {
      return false;
    }
    uint64_t scratch = 0;
    uint32_t tile_rows = c->tile_rows;
    uint32_t tile_columns = c->tile_columns;
    for (size_t i = c->num_stages; i-- > 0;) {
      const Stage& s = stages[i];
      if (!sound(s)) {
        return false;
      }
      uint32_t rows = s.in_rows;
      uint32_t columns = s.in_columns;
      if (!tiles) {
        const uint32_t least = s.upsample != 0 ? s.kernel / 2 + 1 : s.kernel;
        rows = least < s.in_rows ? least : s.in_rows;
      } else if (i > 0 && i < c->num_tiled) {
        rows = tile_rows = reach(s, tile_rows, s.in_rows);
        columns = tile_columns = reach(s, tile_columns, s.in_columns);
      }
      if (!kept(s, rows, columns)) {
        return false;
      }
      if (i > 0) {
        const Stage& before = stages[i - 1];
        if (before.rows != s.in_rows || before.columns != s.in_columns || before.channels != s.in_channels) {
          return false;
        }
      }
      const uint64_t wanted = stage_scratch_bytes(s);
      scratch = wanted > scratch ? wanted : scratch;
    }
    const Stage& last = stages[c->num_stages - 1];
    const uint64_t row = uint64_t{last.columns} * last.channels;
    if (!arena(c->scratch_at, scratch, 8)) {
      return false;
    }
    switch (c->end) {
      case End::rows:
        return arena(c->piece_at, row, 4);
      case End::pixels:
        return last.channels == 12 && record<uint8_t>(c->shades_at, 256) != nullptr &&
               arena(c->piece_at, padded(static_cast<size_t>(row), 4) + uint64_t{last.columns} * 6, 4);
      case End::flatten:
        return wide(c->out) && matrix(c->weights_at, c->by_at, c->num_outputs, row * last.rows) &&
               arena(c->piece_at, kBlock * uint64_t{last.channels}, 4) &&
               arena(c->sums_at, 4 * uint64_t{c->num_outputs}, 4);
      case End::average:
        return wide(c->out) && matrix(c->weights_at, c->by_at, c->num_outputs, last.channels) &&
               row * last.rows <= (1u << 22) && c->mean.multiplier >= 0 && c->mean.shift >= -16 &&
               c->mean.shift <= 31 && c->mean_zero_in >= -128 && c->mean_zero_in <= 127 && c->mean_zero_out >= -128 &&
               c->mean_zero_out <= 127 && arena(c->piece_at, kBlock * uint64_t{last.channels}, 4) &&
               arena(c->sums_at, 4 * uint64_t{last.channels}, 4);
    }
    return false;
  }

  // A matrix on int16 whose rows, at the largest inputs, stay below 2^30.
  bool dense(const Dense& d, uint32_t inputs, uint32_t outputs) const {
    if (d.inputs != inputs || d.outputs != outputs || !within(inputs, 1, kMaxSide) ||
        !within(outputs, 1, kMaxSide * 16) || (d.bits != 8 && d.bits != 4)) {
      return false;
    }
    const size_t stride = padded(inputs, kRowAlign) * d.bits / 8;
    const int8_t* weights = record<int8_t>(d.weights_at, uint64_t{stride} * outputs);
    const Channel* by = record<Channel>(d.by_at, outputs);
    if (weights == nullptr || by == nullptr || d.weights_at % 4 != 0) {
      return false;
    }
    for (size_t o = 0; o < outputs; ++o) {
      int64_t most = by[o].bias < 0 ? -static_cast<int64_t>(by[o].bias) : by[o].bias;
      for (size_t i = 0; i < stride; ++i) {
        const int32_t w = weights[o * stride + i];
        const int32_t above = d.bits == 8 ? w : static_cast<int8_t>(w & 0xf0);
        const int32_t below =
            d.bits == 8 ? 0 : static_cast<int8_t>(static_cast<uint8_t>(static_cast<uint32_t>(w) << 4));
        most += ((above < 0 ? -above : above) + (below < 0 ? -below : below)) * 32768;
      }
      const bool scale = by[o].multiplier >= 0 && by[o].multiplier <= 32767 && by[o].shift >= 15 && by[o].shift <= 46;
      if (!scale || most >= (int64_t{1} << 30)) {
        return false;
      }
    }
    return true;
  }

  bool values(uint32_t at, uint32_t count) const { return arena(at, 2 * uint64_t{padded(count, kRowAlign)}, 4); }

  bool predictor(uint32_t at) const {
    const Predictor* p = record<Predictor>(at);
    if (p == nullptr || !within(p->latent, 1, kMaxSide / 2) || !within(p->action, 1, kMaxSide / 2) ||
        !within(p->hidden, 1, kMaxSide) || p->hidden % kAtOnce != 0 || p->radius >= (1u << 23)) {
      return false;
    }
    const int16_t* tables = record<int16_t>(p->tables_at, 2 * kTable);
    if (tables == nullptr || record<Normalising>(p->actions_at, p->action) == nullptr) {
      return false;
    }
    for (size_t i = 0; i < kTable; ++i) {
      if (tables[i] < 0) {  // sigmoid's; a gate below 0 could overflow
        return false;
      }
    }
    return dense(p->embed, p->latent + p->action, p->hidden) && dense(p->input_gates, p->hidden, 3 * p->hidden) &&
           dense(p->hidden_gates, p->hidden, 3 * p->hidden) && dense(p->from_hidden, p->hidden, p->hidden) &&
           dense(p->from_input, p->hidden, p->hidden) && dense(p->change, p->hidden, p->latent) &&
           arena(p->state_at, 2 * (uint64_t{padded(p->latent, kRowAlign)} + padded(p->hidden, kRowAlign)), 4) &&
           values(p->joined_at, p->latent + p->action) && values(p->x_at, p->hidden) && values(p->next_at, p->hidden) &&
           values(p->mixed_at, p->hidden);
  }

  // Whether a checked chain ends with a latent.
  bool makes_latents(uint32_t at, uint32_t latent) const {
    const Chain* c = reinterpret_cast<const Chain*>(program_ + at);
    return (c->end == End::flatten || c->end == End::average) && c->num_outputs == latent;
  }

  // `latent` is the predictor's.
  bool drawing(uint32_t at, uint32_t decoder_at, uint32_t latent) const {
    const Drawing* d = record<Drawing>(at);
    if (d == nullptr || !chain(decoder_at) || d->zero < -128 || d->zero > 127) {
      return false;
    }
    const Stage& first =
        *reinterpret_cast<const Stage*>(program_ + reinterpret_cast<const Chain*>(program_ + decoder_at)->stages_at);
    return dense(d->matrix, latent, first.in_rows * first.in_columns * first.in_channels);
  }

  bool gauge(uint32_t at, uint32_t latent) const {
    const Gauge* g = record<Gauge>(at);
    return g != nullptr && record<int16_t>(g->mean_at, latent) != nullptr && g->radius99 >= 1 &&
           dense(g->whiten, latent, latent) && values(g->white_at, latent) && values(g->offset_at, latent);
  }

 private:
  static constexpr uint32_t kMaxSide = 4096;
  static constexpr uint64_t kMaxDepth = 1 << 15;

  static bool wide(const Finish& f) {
    return f.low >= -32768 && f.high <= 32767 && f.low <= f.high && f.zero >= -32768 && f.zero <= 32767;
  }

  // Weights that are kept as int16 for speed are int8 all the same.
  bool eights(uint32_t at, uint64_t count) const {
    const int16_t* weights = reinterpret_cast<const int16_t*>(program_ + at);
    for (uint64_t i = 0; i < count; ++i) {
      if (weights[i] < -128 || weights[i] > 127) {
        return false;
      }
    }
    return true;
  }

  const uint8_t* program_;
  uint32_t size_;
  uint32_t arena_;
};

// Check a program: `size_bytes` is what the caller has of it. It must be aligned to 16 bytes, as its arena.
inline Status check(const uint8_t* program, size_t size_bytes, const uint8_t* arena, size_t arena_bytes) {
  if (program == nullptr || arena == nullptr || reinterpret_cast<uintptr_t>(program) % 16 != 0) {
    return Status::bad_argument;
  }
  const Header& header = *reinterpret_cast<const Header*>(program);
  if (size_bytes < sizeof(Header) || load4(header.magic) != 0x6c726f77 || load4(header.magic + 4) != 0x6e697464) {
    return Status::not_a_program;
  }
  if (header.version != kVersion) {
    return Status::other_version;
  }
  if (header.size_bytes < sizeof(Header) || header.size_bytes > size_bytes ||
      crc32(program + sizeof(Header), header.size_bytes - sizeof(Header)) != header.checksum) {
    return Status::damaged;
  }
  if (arena_bytes < header.arena_bytes || reinterpret_cast<uintptr_t>(arena) % 16 != 0) {
    return Status::small_arena;
  }
  const Checker checker(program, header.size_bytes, header.arena_bytes);
  if (header.encoder_at != 0 && !checker.chain(header.encoder_at)) {
    return Status::bad_program;
  }
  if (header.predictor_at == 0) {
    return header.drawing_at == 0 && header.decoder_at == 0 && header.gauge_at == 0 ? Status::ok : Status::bad_program;
  }
  if (!checker.predictor(header.predictor_at)) {
    return Status::bad_program;
  }
  const uint32_t latent = reinterpret_cast<const Predictor*>(program + header.predictor_at)->latent;
  if (header.encoder_at != 0 && !checker.makes_latents(header.encoder_at, latent)) {
    return Status::bad_program;
  }
  if ((header.drawing_at != 0 || header.decoder_at != 0) &&
      !checker.drawing(header.drawing_at, header.decoder_at, latent)) {
    return Status::bad_program;
  }
  if (header.gauge_at != 0 && !checker.gauge(header.gauge_at, latent)) {
    return Status::bad_program;
  }
  return Status::ok;
}

// Where a program lies: in memory that can be written, where its weights are rearranged before use.
template <bool kWritten>
struct BytesOf {
  using Type = const uint8_t;
};
template <>
struct BytesOf<true> {
  using Type = uint8_t;
};
using ProgramBytes = BytesOf<kRearranged>::Type;

inline bool rearrange_chain(const uint8_t*, uint32_t) { return true; }

inline bool rearrange_chain(uint8_t* program, uint32_t at) {
  const Chain* chain = reinterpret_cast<const Chain*>(program + at);
  const Stage* stages = reinterpret_cast<const Stage*>(program + chain->stages_at);
  for (size_t i = 0; at != 0 && i < chain->num_stages; ++i) {
    const Stage& s = stages[i];
    if ((s.kind == Kind::conv || s.kind == Kind::separable) &&
        !rearrange(reinterpret_cast<int8_t*>(program + s.weights_at), patch_lanes(s),
                   reinterpret_cast<Channel*>(program + s.by_at), s.channels)) {
      return false;
    }
  }
  return true;
}

// Check a program and make it ready for the kernels. Where these want weights in another order, the program is theirs
// from now on: taken a second time, it is `damaged`.
inline Status take(ProgramBytes* program, size_t size_bytes, const uint8_t* arena, size_t arena_bytes) {
  const Status status = check(program, size_bytes, arena, arena_bytes);
  if (status != Status::ok || !kRearranged) {
    return status;
  }
  const Header& header = *reinterpret_cast<const Header*>(program);
  const bool done = rearrange_chain(program, header.encoder_at) && rearrange_chain(program, header.decoder_at);
  return done ? Status::ok : Status::small_arena;
}

}  // namespace tinyengine

#endif
