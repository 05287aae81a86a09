// Kernels for Helium (Cortex-M55): sixteen products of int8 in one instruction.
#ifndef TINYENGINE_KERNELS_MVE_HPP
#define TINYENGINE_KERNELS_MVE_HPP

#include <arm_mve.h>

#include "base.hpp"

namespace tinyengine {

// A patch is what one output pixel is computed from, as lanes; a block is as many patches as are computed together.
using Lane = int8_t;
constexpr size_t kBlock = 4;
constexpr bool kRearranged = false;

inline bool rearrange(const int8_t*, size_t, const Channel*, size_t) { return true; }

// Turn `n` bytes into the lanes of patch `p` of a block; `lanes` apart the patches begin.
inline void expand(const int8_t* from, size_t n, Lane* block, size_t p, size_t lanes) {
  int8_t* to = block + p * lanes;
  for (size_t i = 0; i < n; i += 16) {
    const mve_pred16_t some = vctp8q(static_cast<uint32_t>(n - i));
    vstrbq_p_s8(to + i, vldrbq_z_s8(from + i, some), some);
  }
}

// Scaled accumulators; the rounding shift adds the half, the sign makes it away from zero.
inline int32x4_t rounded(int32x4_t product, int32x4_t left) {
  return vrshlq_s32(vaddq_s32(product, vshrq_n_s32(product, 31)), left);
}

// `dot_block` of four patches, or of some: those that are missing are computed from what lies there, and not stored.
template <bool kWhole>
inline void dot_patches(const Lane* block, size_t num_patches, size_t depth, const int8_t* weights, size_t stride,
                        const Channel* by, size_t num_out, const Finish& to, int8_t* out) {
  const mve_pred16_t there = vctp32q(static_cast<uint32_t>(num_patches));
  const uint32x4_t places = vmulq_n_u32(vidupq_n_u32(0, 1), static_cast<uint32_t>(num_out));
  const int32x4_t zero = vdupq_n_s32(to.zero);
  const int32x4_t low = vdupq_n_s32(to.low);
  const int32x4_t high = vdupq_n_s32(to.high);
  const size_t sixteens = (depth + 15) / 16;
  for (size_t o = 0; o < num_out; ++o, weights += stride) {
    const int8_t* w = weights;
    const int8_t* x0 = block;
    const int8_t* x1 = x0 + stride;
    const int8_t* x2 = x1 + stride;
    const int8_t* x3 = x2 + stride;
    int32_t a0 = by[o].bias;
    int32_t a1 = a0;
    int32_t a2 = a0;
    int32_t a3 = a0;
    size_t left = sixteens;
    do {
      const int8x16_t v = vldrbq_s8(w);
      a0 = vmladavaq_s8(a0, v, vldrbq_s8(x0));
      a1 = vmladavaq_s8(a1, v, vldrbq_s8(x1));
      a2 = vmladavaq_s8(a2, v, vldrbq_s8(x2));
      a3 = vmladavaq_s8(a3, v, vldrbq_s8(x3));
      w += 16;
      x0 += 16;
      x1 += 16;
      x2 += 16;
      x3 += 16;
    } while (--left != 0);
    int32x4_t acc = {a0, a1, a2, a3};
    acc = vqrdmulhq_n_s32(acc, by[o].multiplier);
    acc = vrshlq_n_s32(vaddq_s32(acc, vshrq_n_s32(acc, 31)), -by[o].shift);
    acc = vminq_s32(vmaxq_s32(vaddq_s32(acc, zero), low), high);
    if (kWhole) {
      vstrbq_scatter_offset_s32(out + o, places, acc);
    } else {
      vstrbq_scatter_offset_p_s32(out + o, places, acc, there);
    }
  }
}

// out[p][o] = finish(patch p . weights o): `depth` lanes a patch, rows of weights `stride` apart and 0 beyond `depth`.
inline void dot_block(const Lane* block, size_t num_patches, size_t depth, const int8_t* weights, size_t stride,
                      const Channel* by, size_t num_out, const Finish& to, int8_t* out) {
  if (num_patches == kBlock) {
    dot_patches<true>(block, num_patches, depth, weights, stride, by, num_out, to, out);
  } else {
    dot_patches<false>(block, num_patches, depth, weights, stride, by, num_out, to, out);
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
  const int16x8_t low = vdupq_n_s16(static_cast<int16_t>(to.low));
  const int16x8_t high = vdupq_n_s16(static_cast<int16_t>(to.high));
  const uint32x4_t even = vmulq_n_u32(vidupq_n_u32(0, 1), 2 * sizeof(Channel));
  const uint32x4_t odd = vaddq_n_u32(even, sizeof(Channel));
  const int8_t* const* const end = taps + num_taps;
  for (size_t c = 0; c < channels; c += 8) {
    const uint32_t left = static_cast<uint32_t>(channels - c);
    const mve_pred16_t some = vctp16q(left);
    const mve_pred16_t some_even = vctp32q((left + 1) / 2);
    const mve_pred16_t some_odd = vctp32q(left / 2);
    const int32_t* const first = &by[c].bias;
    int32x4_t a = vldrwq_gather_offset_z_s32(first, even, some_even);
    int32x4_t b = vldrwq_gather_offset_z_s32(first, odd, some_odd);
    const int16_t* w = weights + c;
    if (left >= 8) {
      for (const int8_t* const* t = taps; t != end; ++t, w += channels) {
        const int16x8_t x = vldrbq_s16(*t + c);
        const int16x8_t v = vldrhq_s16(w);
        a = vaddq_s32(a, vmullbq_int_s16(x, v));
        b = vaddq_s32(b, vmulltq_int_s16(x, v));
      }
    } else {
      for (const int8_t* const* t = taps; t != end; ++t, w += channels) {
        const int16x8_t x = vldrbq_z_s16(*t + c, some);
        const int16x8_t v = vldrhq_z_s16(w, some);
        a = vaddq_s32(a, vmullbq_int_s16(x, v));
        b = vaddq_s32(b, vmulltq_int_s16(x, v));
      }
    }
    a = vqrdmulhq_s32(a, vldrwq_gather_offset_z_s32(first + 1, even, some_even));
    b = vqrdmulhq_s32(b, vldrwq_gather_offset_z_s32(first + 1, odd, some_odd));
    a = rounded(a, vnegq_s32(vldrwq_gather_offset_z_s32(first + 2, even, some_even)));
    b = rounded(b, vnegq_s32(vldrwq_gather_offset_z_s32(first + 2, odd, some_odd)));
    a = vaddq_n_s32(a, to.zero);
    b = vaddq_n_s32(b, to.zero);
    int16x8_t both = vqmovnbq_s32(low, a);
    both = vqmovntq_s32(both, b);
    both = vminq_s16(vmaxq_s16(both, low), high);
    vstrbq_p_s16(out.place() + c, both, some);
  }
}

// y = x . row of several rows, int16 with int8; n is a multiple of 16.
template <size_t kRows>
inline void dots_wide(const int16_t* x, const int8_t* const (&rows)[kRows], size_t n, int32_t (&out)[kRows]) {
  int32_t acc[kRows] = {};
  for (size_t i = 0; i < n; i += 8) {
    const int16x8_t v = vldrhq_s16(x + i);
    for (size_t row = 0; row < kRows; ++row) {
      acc[row] = vmladavaq_s16(acc[row], v, vldrbq_s16(rows[row] + i));
    }
  }
  for (size_t row = 0; row < kRows; ++row) {
    out[row] = acc[row];
  }
}

// The same of rows of 4 bits a weight, as `Dense` says.
template <size_t kRows>
inline void dots_halves(const int16_t* x, const int8_t* const (&rows)[kRows], size_t n, int32_t (&out)[kRows]) {
  int32_t acc[kRows] = {};
  for (size_t i = 0; i < n; i += 16) {
    const int16x8_t first = vldrhq_s16(x + i);
    const int16x8_t second = vldrhq_s16(x + i + 8);
    for (size_t row = 0; row < kRows; ++row) {
      const int16x8_t both = vldrbq_s16(rows[row] + i / 2);
      acc[row] = vmladavaq_s16(acc[row], first, vbicq_n_s16(both, 0x0f));
      acc[row] = vmladavaq_s16(acc[row], second, vshrq_n_s16(vshlq_n_s16(both, 12), 8));
    }
  }
  for (size_t row = 0; row < kRows; ++row) {
    out[row] = acc[row];
  }
}

// y = x . row, int8 with int8.
inline int32_t dot_narrow(const int8_t* x, const int8_t* row, size_t n) {
  int32_t acc = 0;
  for (size_t i = 0; i < n; i += 16) {
    const mve_pred16_t some = vctp8q(static_cast<uint32_t>(n - i));
    acc = vmladavaq_s8(acc, vldrbq_z_s8(x + i, some), vldrbq_z_s8(row + i, some));
  }
  return acc;
}

}  // namespace tinyengine

#endif
