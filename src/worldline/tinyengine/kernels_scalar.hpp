// Kernels in plain C++: what every other variant must equal. On x86 the compiler turns the dot products into VNNI.
#ifndef TINYENGINE_KERNELS_SCALAR_HPP
#define TINYENGINE_KERNELS_SCALAR_HPP

#include "base.hpp"

namespace tinyengine {

// A patch is what one output pixel is computed from, as lanes; a block is as many patches as are computed together.
using Lane = int8_t;
constexpr size_t kBlock = 4;

// Turn `n` bytes into the lanes of patch `p` of a block; `lanes` apart the patches begin.
inline void expand(const int8_t* from, size_t n, Lane* block, size_t p, size_t lanes) {
  copy(block + p * lanes, from, n);
}

// out[p][o] = finish(patch p . weights o): `depth` lanes a patch, rows of weights `stride` apart and 0 beyond `depth`.
inline void dot_block(const Lane* block, size_t num_patches, size_t depth, const int8_t* weights, size_t stride,
                      const Channel* by, size_t num_out, const Finish& to, int8_t* out) {
  for (size_t o = 0; o < num_out; ++o, weights += stride) {
    for (size_t p = 0; p < num_patches; ++p) {
      const Lane* patch = block + p * stride;
      int32_t acc = by[o].bias;
      for (size_t i = 0; i < depth; ++i) {
        acc += static_cast<int16_t>(patch[i]) * static_cast<int16_t>(weights[i]);
      }
      out[p * num_out + o] = static_cast<int8_t>(finish(acc, by[o], to));
    }
  }
}

// Where a depthwise pixel goes: to bytes, or to the lanes of a block's patch.
struct ToBytes {
  int8_t* out;
  int8_t* place() const { return out; }
};

struct ToLanes {
  Lane* block;
  size_t p;
  size_t lanes;
  int8_t* place() const { return block + p * lanes; }
};

// One pixel of a depthwise convolution; weights are [tap][channel].
template <class To>
void depthwise_pixel(const int8_t* const* taps, size_t num_taps, const int16_t* weights, const Channel* by,
                     size_t channels, const Finish& to, const To& out) {
  for (size_t c = 0; c < channels; ++c) {
    int32_t acc = by[c].bias;
    for (size_t t = 0; t < num_taps; ++t) {
      acc += taps[t][c] * weights[t * channels + c];
    }
    out.place()[c] = static_cast<int8_t>(finish(acc, by[c], to));
  }
}

// y = x . row of several rows, int16 with int8; n is a multiple of 16.
template <size_t kRows>
inline void dots_wide(const int16_t* x, const int8_t* const (&rows)[kRows], size_t n, int32_t (&out)[kRows]) {
  for (size_t row = 0; row < kRows; ++row) {
    int32_t acc = 0;
    for (size_t i = 0; i < n; ++i) {
      acc += x[i] * static_cast<int16_t>(rows[row][i]);
    }
    out[row] = acc;
  }
}

// y = x . row, int8 with int8.
inline int32_t dot_narrow(const int8_t* x, const int8_t* row, size_t n) {
  int32_t acc = 0;
  for (size_t i = 0; i < n; ++i) {
    acc += static_cast<int16_t>(x[i]) * static_cast<int16_t>(row[i]);
  }
  return acc;
}

}  // namespace tinyengine

#endif
