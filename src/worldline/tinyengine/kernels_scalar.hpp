// Kernels in plain C++: what every other variant must equal.
#ifndef TINYENGINE_KERNELS_SCALAR_HPP
#define TINYENGINE_KERNELS_SCALAR_HPP

#include "base.hpp"

namespace tinyengine {

// A patch is what one output pixel is computed from, as lanes; a block is as many patches as are computed together.
using Lane = int8_t;
constexpr size_t kBlock = 4;
constexpr bool kRearranged = false;

inline bool rearrange(const int8_t*, size_t, const Channel*, size_t) { return true; }

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
  void put(size_t c, int32_t value) const { out[c] = static_cast<int8_t>(value); }
};

struct ToLanes {
  Lane* block;
  size_t p;
  size_t lanes;
  void put(size_t c, int32_t value) const { block[p * lanes + c] = static_cast<Lane>(value); }
};

}  // namespace tinyengine

#include "kernels_plain.hpp"

#endif
