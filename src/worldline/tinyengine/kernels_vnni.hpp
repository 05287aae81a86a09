// Kernels for x86 with AVX-512 VNNI: sixteen channels side by side, four products of bytes in each.
#ifndef TINYENGINE_KERNELS_VNNI_HPP
#define TINYENGINE_KERNELS_VNNI_HPP

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header reads what it calls undefined
#endif
#include <immintrin.h>
#include <stdlib.h>

#include "base.hpp"

namespace tinyengine {

// A patch is what one output pixel is computed from, as lanes; a block is as many patches as are computed together.
// Lanes are pixels + 128, which the instruction wants unsigned; `rearrange` tells the biases.
using Lane = uint8_t;
constexpr size_t kBlock = 4;
constexpr bool kRearranged = true;

// Rows of weights, `stride` apart, become fours of each row in turn: [stride / 4][rows][4]. False if memory is wanting.
inline bool rearrange(int8_t* weights, size_t stride, Channel* by, size_t num_out) {
  int8_t* const room = static_cast<int8_t*>(malloc(stride * num_out));
  if (room == nullptr) {
    return false;
  }
  for (size_t o = 0; o < num_out; ++o) {
    int32_t total = 0;
    for (size_t i = 0; i < stride; ++i) {
      room[(i / 4 * num_out + o) * 4 + i % 4] = weights[o * stride + i];
      total += weights[o * stride + i];
    }
    by[o].bias -= 128 * total;
  }
  copy(weights, room, stride * num_out);
  free(room);
  return true;
}

// Turn `n` bytes into the lanes of patch `p` of a block; `lanes` apart the patches begin.
inline void expand(const int8_t* from, size_t n, Lane* block, size_t p, size_t lanes) {
  Lane* to = block + p * lanes;
  for (size_t i = 0; i < n; ++i) {
    to[i] = static_cast<Lane>(from[i] ^ -128);
  }
}

// What sixteen channels' accumulators become.
class Sixteen {
 public:
  Sixteen(const Channel* by, __mmask16 there, const Finish& to)
      : zero_(_mm512_set1_epi32(to.zero)), low_(_mm512_set1_epi32(to.low)), high_(_mm512_set1_epi32(to.high)) {
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(sizeof(Channel)));
    const __m512i none = _mm512_setzero_si512();
    bias = _mm512_mask_i32gather_epi32(none, there, places, &by->bias, 1);
    multiplier_ = _mm512_mask_i32gather_epi32(none, there, places, &by->multiplier, 1);
    shift_ = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(1), there, places, &by->shift, 1);
    half_ = _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_sub_epi32(shift_, _mm512_set1_epi32(1)));
  }

  __m128i finish(__m512i acc) const {
    const __m512i nudge = _mm512_set1_epi64(1 << 30);
    const __m512i even = _mm512_srli_epi64(_mm512_add_epi64(_mm512_mul_epi32(acc, multiplier_), nudge), 31);
    const __m512i odd = _mm512_slli_epi64(
        _mm512_add_epi64(_mm512_mul_epi32(_mm512_srli_epi64(acc, 32), _mm512_srli_epi64(multiplier_, 32)), nudge), 1);
    const __m512i product = _mm512_mask_blend_epi32(0xaaaa, even, odd);
    const __m512i away = _mm512_add_epi32(_mm512_add_epi32(product, half_), _mm512_srai_epi32(product, 31));
    const __m512i scaled = _mm512_add_epi32(_mm512_srav_epi32(away, shift_), zero_);
    return _mm512_cvtepi32_epi8(_mm512_min_epi32(_mm512_max_epi32(scaled, low_), high_));
  }

  __m512i bias;

 private:
  __m512i zero_, low_, high_, multiplier_, shift_, half_;
};

inline __m512i four_of(const Lane* patch, size_t four) {
  return _mm512_set1_epi32(static_cast<int32_t>(load4(patch + 4 * four)));
}

// out[p][o] = finish(patch p . weights o): `depth` lanes a patch, rearranged weights, rows of them `stride` long.
inline void dot_block(const Lane* block, size_t num_patches, size_t depth, const int8_t* weights, size_t stride,
                      const Channel* by, size_t num_out, const Finish& to, int8_t* out) {
  const size_t fours = (depth + 3) / 4;
  for (size_t o = 0; o < num_out; o += 32) {
    const size_t left = num_out - o;
    const __mmask16 there = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
    const __mmask16 more = static_cast<__mmask16>(left >= 32 ? 0xffff : left > 16 ? (1u << (left - 16)) - 1 : 0);
    const Sixteen a(by + o, there, to);
    const Sixteen b(by + o + (more != 0 ? 16 : 0), more, to);
    __m512i first[kBlock] = {a.bias, a.bias, a.bias, a.bias};
    __m512i second[kBlock] = {b.bias, b.bias, b.bias, b.bias};
    const int8_t* w = weights + 4 * o;
    if (more != 0) {
      for (size_t k = 0; k < fours; ++k, w += 4 * num_out) {
        const __m512i u = _mm512_maskz_loadu_epi32(there, w);
        const __m512i v = _mm512_maskz_loadu_epi32(more, w + 64);
        for (size_t p = 0; p < kBlock; ++p) {  // missing patches are computed from what lies there, and not stored
          const __m512i x = four_of(block + p * stride, k);
          first[p] = _mm512_dpbusd_epi32(first[p], x, u);
          second[p] = _mm512_dpbusd_epi32(second[p], x, v);
        }
      }
    } else {
      for (size_t k = 0; k < fours; ++k, w += 4 * num_out) {
        const __m512i u = _mm512_maskz_loadu_epi32(there, w);
        for (size_t p = 0; p < kBlock; ++p) {
          first[p] = _mm512_dpbusd_epi32(first[p], four_of(block + p * stride, k), u);
        }
      }
    }
    for (size_t p = 0; p < num_patches; ++p) {
      _mm_mask_storeu_epi8(out + p * num_out + o, there, a.finish(first[p]));
      if (more != 0) {
        _mm_mask_storeu_epi8(out + p * num_out + o + 16, more, b.finish(second[p]));
      }
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
  void put(size_t c, int32_t value) const { block[p * lanes + c] = static_cast<Lane>(value ^ 128); }
};

}  // namespace tinyengine

#include "kernels_plain.hpp"

#endif
