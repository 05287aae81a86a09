// A stage makes rows of one grid from rows of the one before; every schedule is a way of calling `stage_row`.
#ifndef TINYENGINE_STAGE_HPP
#define TINYENGINE_STAGE_HPP

#include "kernels.hpp"

namespace tinyengine {

enum class Kind : uint32_t { conv = 1, depthwise = 2, separable = 3, average_pool = 4, max_pool = 5 };

constexpr size_t kMaxKernel = 5;

// As it lies in a program: places (`*_at`) are bytes from the program's beginning, or from the arena's.
struct Stage {
  Kind kind;
  uint32_t in_rows, in_columns, in_channels;
  uint32_t rows, columns, channels;
  uint32_t kernel, stride, top, left;
  uint32_t upsample;  // 1: input rows and columns count twice
  int32_t zero_in;
  Finish middle;  // separable: of the depthwise half
  Finish out;
  uint32_t middle_weights_at, middle_by_at;
  uint32_t weights_at, by_at;
  uint32_t depth;               // values in a patch
  uint32_t padding_at;          // in_channels bytes of zero_in
  uint32_t ring_at, ring_rows;  // in the arena: where the last input rows are kept
};

constexpr size_t kRowAlign = 16;  // rows of weights begin at multiples of it

constexpr size_t patch_lanes(const Stage& s) { return padded(s.depth, kRowAlign); }

// Bytes that `stage_row` wants to itself.
constexpr size_t stage_scratch_bytes(const Stage& s) {
  const bool dots = s.kind == Kind::conv || s.kind == Kind::separable;
  const size_t gathered = s.kind == Kind::conv && s.kernel > 1 ? patch_lanes(s) : 0;
  return dots ? kBlock * patch_lanes(s) * sizeof(Lane) + gathered : 0;
}

// Input columns in memory: `rows[i]` holds row i under the kernel from column `base` on, or is null beyond the grid.
struct Window {
  const int8_t* rows[kMaxKernel];
  int32_t base;
};

// Where one value of the window lies, or where it is padding.
inline const int8_t* tap(const Stage& s, const uint8_t* program, const Window& window, size_t row, int32_t column) {
  if (window.rows[row] == nullptr || column < 0 || column >= static_cast<int32_t>(s.in_columns << s.upsample)) {
    return reinterpret_cast<const int8_t*>(program + s.padding_at);
  }
  return window.rows[row] + static_cast<size_t>((column >> s.upsample) - window.base) * s.in_channels;
}

// Where each place under the kernel at output column x lies; returns their number.
inline size_t find_taps(const Stage& s, const uint8_t* program, const Window& window, int32_t x, const int8_t** taps) {
  const int32_t first = x * static_cast<int32_t>(s.stride) - static_cast<int32_t>(s.left);
  const int32_t kernel = static_cast<int32_t>(s.kernel);
  const bool inside = first >= 0 && first + kernel <= static_cast<int32_t>(s.in_columns);
  const int8_t** to = taps;
  for (size_t row = 0; row < s.kernel; ++row) {
    if (inside && window.rows[row] != nullptr) {
      const int8_t* at = window.rows[row] + static_cast<size_t>(first - window.base) * s.in_channels;
      for (int32_t i = kernel; i > 0; --i) {
        *to++ = at;
        at += s.in_channels;
      }
    } else {
      for (int32_t i = 0; i < kernel; ++i) {
        *to++ = tap(s, program, window, row, first + i);
      }
    }
  }
  return s.kernel * s.kernel;
}

// All values under the kernel at output column x, as the lanes of patch `p` of a block.
inline void gather(const Stage& s, const uint8_t* program, const Window& window, int32_t x, Lane* block, size_t p) {
  const int32_t first = x * static_cast<int32_t>(s.stride) - static_cast<int32_t>(s.left);
  const size_t lanes = patch_lanes(s);
  if (s.kernel == 1) {
    expand(tap(s, program, window, 0, first), s.depth, block, p, lanes);
    return;
  }
  int8_t* const bytes = reinterpret_cast<int8_t*>(block + kBlock * lanes);
  int8_t* to = bytes;
  const size_t run = s.kernel * s.in_channels;
  const bool inside = first >= 0 && first + static_cast<int32_t>(s.kernel) <= static_cast<int32_t>(s.in_columns);
  for (size_t row = 0; row < s.kernel; ++row) {
    if (window.rows[row] == nullptr) {
      fill(to, static_cast<int8_t>(s.zero_in), run);
      to += run;
    } else if (inside && s.upsample == 0) {
      copy(to, tap(s, program, window, row, first), run);
      to += run;
    } else {
      for (size_t i = 0; i < s.kernel; ++i, to += s.in_channels) {
        copy(to, tap(s, program, window, row, first + static_cast<int32_t>(i)), s.in_channels);
      }
    }
  }
  expand(bytes, s.depth, block, p, lanes);
}

inline void pool_pixel(const Stage& s, const uint8_t* program, const Window& window, int32_t x, int8_t* out) {
  const int32_t count = static_cast<int32_t>(s.kernel * s.kernel);
  for (size_t c = 0; c < s.channels; ++c) {
    int32_t total = 0;
    int32_t most = -128;
    for (size_t row = 0; row < s.kernel; ++row) {
      for (size_t i = 0; i < s.kernel; ++i) {
        const int32_t value =
            tap(s, program, window, row, x * static_cast<int32_t>(s.stride) + static_cast<int32_t>(i))[c];
        total += value;
        most = value > most ? value : most;
      }
    }
    out[c] = static_cast<int8_t>(s.kind == Kind::max_pool ? most : average(total, count));
  }
}

// Compute output columns from `begin` to before `end` of one row, to `out`.
inline void stage_row(const Stage& s, const uint8_t* program, const Window& window, int32_t begin, int32_t end,
                      Lane* scratch, int8_t* out) {
  const Channel* by = reinterpret_cast<const Channel*>(program + s.by_at);
  const int8_t* weights = reinterpret_cast<const int8_t*>(program + s.weights_at);
  const Channel* middle_by = reinterpret_cast<const Channel*>(program + s.middle_by_at);
  const int16_t* middle_weights = reinterpret_cast<const int16_t*>(program + s.middle_weights_at);
  const size_t lanes = patch_lanes(s);
  for (int32_t x = begin; x < end;) {
    if (s.kind == Kind::average_pool || s.kind == Kind::max_pool) {
      pool_pixel(s, program, window, x, out);
      ++x;
      out += s.channels;
      continue;
    }
    const size_t block = s.kind == Kind::depthwise
                             ? 1
                             : (end - x < static_cast<int32_t>(kBlock) ? static_cast<size_t>(end - x) : kBlock);
    for (size_t p = 0; p < block; ++p, ++x) {
      if (s.kind == Kind::conv) {
        gather(s, program, window, x, scratch, p);
        continue;
      }
      const int8_t* taps[kMaxKernel * kMaxKernel];
      const size_t num_taps = find_taps(s, program, window, x, taps);
      if (s.kind == Kind::separable) {
        depthwise_pixel(taps, num_taps, middle_weights, middle_by, s.in_channels, s.middle, ToLanes{scratch, p, lanes});
      } else {
        depthwise_pixel(taps, num_taps, middle_weights, middle_by, s.in_channels, s.middle, ToBytes{out});
      }
    }
    if (s.kind != Kind::depthwise) {
      dot_block(scratch, block, s.depth, weights, lanes, by, s.channels, s.out, out);
    }
    out += block * s.channels;
  }
}

}  // namespace tinyengine

#endif
