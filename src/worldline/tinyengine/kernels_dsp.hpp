// Kernels for cores with the DSP extension (Cortex-M4, M7, M33): two products of int16 in one instruction.
#ifndef TINYENGINE_KERNELS_DSP_HPP
#define TINYENGINE_KERNELS_DSP_HPP

#include <arm_acle.h>

#include "base.hpp"

namespace tinyengine {

// Lanes are int16, four by four in the order 0, 2, 1, 3: so SXTB16 pairs the bytes of a word, of weights as of pixels.
// The fours of both patches of a block take turns.
using Lane = int16_t;
constexpr size_t kBlock = 2;
constexpr bool kRearranged = false;

inline bool rearrange(const int8_t*, size_t, const Channel*, size_t) { return true; }

inline int16x2_t even(uint32_t bytes) { return __sxtb16(static_cast<int8x4_t>(bytes)); }

inline int16x2_t odd(uint32_t bytes) {
  int16x2_t pair;
  asm("sxtb16 %0, %1, ror #8" : "=r"(pair) : "r"(bytes));  // the intrinsic would rotate by itself
  return pair;
}

// A place in a block: patch `p`, from lane 4 * `four` on.
inline int16x2_t* four_at(Lane* block, size_t p, size_t four) {
  return reinterpret_cast<int16x2_t*>(block) + 4 * four + 2 * p;
}

// Turn `n` bytes into the lanes of patch `p`.
inline void expand(const int8_t* from, size_t n, Lane* block, size_t p, size_t) {
  int16x2_t* to = four_at(block, p, 0);
  for (; n >= 4; n -= 4, from += 4, to += 4) {
    const uint32_t bytes = load4(from);
    to[0] = even(bytes);
    to[1] = odd(bytes);
  }
  if (n > 0) {
    uint32_t rest = 0;
    for (size_t i = 0; i < n; ++i) {
      rest |= static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << (8 * i);
    }
    to[0] = even(rest);
    to[1] = odd(rest);
  }
}

// How a channel's accumulators are scaled, in registers. They stay below 2^30, so twice as much fits.
struct Rounding {
  int32_t multiplier;
  int32_t shift;
  int32_t half;

  explicit Rounding(const Channel& by)
      : multiplier(by.multiplier), shift(by.shift), half(static_cast<int32_t>(1u << (by.shift - 1))) {}

  int32_t scaled(int32_t acc) const {
    int32_t product;
    asm("smmulr %0, %1, %2" : "=r"(product) : "r"(acc * 2), "r"(multiplier));
    return (product + half + (product >> 31)) >> shift;
  }
};

// One value four times, to compare four others with.
struct Bytes {
  uint32_t four;
  explicit Bytes(int32_t value) : four(static_cast<uint32_t>(value & 0xff) * 0x01010101u) {}

  uint32_t most(uint32_t x) const {
    uint32_t result;
    asm("ssub8 %0, %1, %2\n sel %0, %1, %2" : "=&r"(result) : "r"(x), "r"(four) : "cc");
    return result;
  }

  uint32_t least(uint32_t x) const {
    uint32_t result;
    asm("ssub8 %0, %2, %1\n sel %0, %1, %2" : "=&r"(result) : "r"(x), "r"(four) : "cc");
    return result;
  }
};

// Four values, saturated, as bytes from low to high.
inline uint32_t pack(int32_t a, int32_t b, int32_t c, int32_t d) {
  uint32_t low = static_cast<uint32_t>(__ssat(a, 8));
  uint32_t high = static_cast<uint32_t>(__ssat(c, 8));
  asm("bfi %0, %1, #8, #24" : "+r"(low) : "r"(__ssat(b, 8)));
  asm("bfi %0, %1, #8, #24" : "+r"(high) : "r"(__ssat(d, 8)));
  return (low & 0xffff) | (high << 16);
}

inline void store2(int8_t* to, uint32_t bytes) {
  const uint16_t two = static_cast<uint16_t>(bytes);
  __builtin_memcpy(to, &two, 2);
}

// Four values of two rows of weights, times those of both patches.
#define TINYENGINE_FOUR                  \
  "ldm %[x]!, {r4, r5, r6, r8}\n"        \
  "ldr %[bytes], [%[w0]], #4\n"          \
  "sxtb16 %[pair], %[bytes]\n"           \
  "sxtb16 %[bytes], %[bytes], ror #8\n"  \
  "smlad %[a00], %[pair], r4, %[a00]\n"  \
  "smlad %[a01], %[pair], r6, %[a01]\n"  \
  "smlad %[a00], %[bytes], r5, %[a00]\n" \
  "smlad %[a01], %[bytes], r8, %[a01]\n" \
  "ldr %[bytes], [%[w1]], #4\n"          \
  "sxtb16 %[pair], %[bytes]\n"           \
  "sxtb16 %[bytes], %[bytes], ror #8\n"  \
  "smlad %[a10], %[pair], r4, %[a10]\n"  \
  "smlad %[a11], %[pair], r6, %[a11]\n"  \
  "smlad %[a10], %[bytes], r5, %[a10]\n" \
  "smlad %[a11], %[bytes], r8, %[a11]\n"

// out[p][o] = finish(patch p . weights o): `depth` lanes a patch, rows of weights `stride` apart and 0 beyond `depth`.
inline void dot_block(const Lane* block, size_t num_patches, size_t depth, const int8_t* weights, size_t stride,
                      const Channel* by, size_t num_out, const Finish& to, int8_t* out) {
  // eight by eight: weights are 0 beyond the depth
  const int16x2_t* const end = reinterpret_cast<const int16x2_t*>(block) + (depth + 7) / 8 * 8;
  const Bytes low(to.low);
  const Bytes high(to.high);
  const int32_t zero = to.zero;
  for (size_t o = 0; o < num_out; o += 2) {
    const size_t next = o + 1 < num_out ? 1 : 0;
    const uint32_t* w0 = reinterpret_cast<const uint32_t*>(weights + o * stride);
    const uint32_t* w1 = reinterpret_cast<const uint32_t*>(weights + (o + next) * stride);
    const int16x2_t* x = reinterpret_cast<const int16x2_t*>(block);
    int32_t a00 = by[o].bias;
    int32_t a01 = a00;
    int32_t a10 = by[o + next].bias;
    int32_t a11 = a10;
    uint32_t bytes, pair;
    // nearly all registers are wanted, and compilers do not find out how few are enough
    asm volatile("1:\n" TINYENGINE_FOUR TINYENGINE_FOUR
                 "ldr %[bytes], %[end]\n"
                 "cmp %[x], %[bytes]\n"
                 "bne 1b\n"
                 : [a00] "+r"(a00), [a01] "+r"(a01), [a10] "+r"(a10), [a11] "+r"(a11), [w0] "+r"(w0), [w1] "+r"(w1),
                   [x] "+r"(x), [bytes] "=&r"(bytes), [pair] "=&r"(pair)
                 : [end] "m"(end)
                 : "r4", "r5", "r6", "r8", "cc", "memory");
    const Rounding r0(by[o]);
    const Rounding r1(by[o + next]);
    const uint32_t bytes0 =
        pack(r0.scaled(a00) + zero, r1.scaled(a10) + zero, r0.scaled(a01) + zero, r1.scaled(a11) + zero);
    const uint32_t clamped = high.least(low.most(bytes0));
    if (next != 0) {
      store2(out + o, clamped);
      if (num_patches > 1) {
        store2(out + num_out + o, clamped >> 16);
      }
    } else {
      out[o] = static_cast<int8_t>(clamped);
      if (num_patches > 1) {
        out[num_out + o] = static_cast<int8_t>(clamped >> 16);
      }
    }
  }
}

// Where a depthwise pixel goes: to bytes, or to the lanes of a block's patch.
struct ToBytes {
  int8_t* out;
  void put(size_t c, uint32_t four) const { store4(out + c, four); }
  void put_last(size_t c, size_t n, uint32_t four) const {
    for (size_t i = 0; i < n; ++i) {
      out[c + i] = static_cast<int8_t>(four >> (8 * i));
    }
  }
};

struct ToLanes {
  Lane* block;
  size_t p;
  size_t lanes;
  void put(size_t c, uint32_t four) const {
    int16x2_t* to = four_at(block, p, c / 4);
    to[0] = even(four);
    to[1] = odd(four);
  }
  void put_last(size_t c, size_t, uint32_t four) const { put(c, four); }
};

// One pixel of a depthwise convolution; weights are [tap][channel].
template <class To>
void depthwise_pixel(const int8_t* const* taps, size_t num_taps, const int16_t* weights, const Channel* by,
                     size_t channels, const Finish& to, const To& out) {
  const Bytes low(to.low);
  const Bytes high(to.high);
  const int32_t zero = to.zero;
  const int8_t* const* const end = taps + num_taps;
  size_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    int32_t a0 = by[c].bias;
    int32_t a1 = by[c + 1].bias;
    int32_t a2 = by[c + 2].bias;
    int32_t a3 = by[c + 3].bias;
    const int16_t* w = weights + c;
    for (const int8_t* const* t = taps; t != end; ++t, w += channels) {
      const uint32_t x = load4(*t + c);
      const int16x2_t x02 = even(x);
      const int16x2_t x13 = odd(x);
      const int32_t w01 = static_cast<int32_t>(load4(w));
      const int32_t w23 = static_cast<int32_t>(load4(w + 2));
      a0 = __smlabb(x02, w01, a0);
      a1 = __smlabt(x13, w01, a1);
      a2 = __smlatb(x02, w23, a2);
      a3 = __smlatt(x13, w23, a3);
    }
    a0 = Rounding(by[c]).scaled(a0) + zero;
    a1 = Rounding(by[c + 1]).scaled(a1) + zero;
    a2 = Rounding(by[c + 2]).scaled(a2) + zero;
    a3 = Rounding(by[c + 3]).scaled(a3) + zero;
    out.put(c, high.least(low.most(pack(a0, a1, a2, a3))));
  }
  if (c < channels) {
    uint32_t rest = 0;
    for (size_t i = 0; c + i < channels; ++i) {
      int32_t acc = by[c + i].bias;
      for (size_t t = 0; t < num_taps; ++t) {
        acc += taps[t][c + i] * weights[t * channels + c + i];
      }
      rest |= static_cast<uint32_t>(finish(acc, by[c + i], to) & 0xff) << (8 * i);
    }
    out.put_last(c, channels - c, rest);
  }
}

// y = x . row of several rows, int16 with int8; n is a multiple of 16, x lies at a multiple of 4.
template <size_t kRows>
inline void dots_wide(const int16_t* x, const int8_t* const (&rows)[kRows], size_t n, int32_t (&out)[kRows]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(x);
  int32_t acc[kRows] = {};
  for (size_t i = 0; i < n; i += 4, words += 2) {
    const int16x2_t x02 = static_cast<int16x2_t>((words[0] & 0xffff) | (words[1] << 16));
    const int16x2_t x13 = static_cast<int16x2_t>((words[0] >> 16) | (words[1] & 0xffff0000));
    for (size_t row = 0; row < kRows; ++row) {
      const uint32_t w = load4(rows[row] + i);
      acc[row] = __smlad(even(w), x02, acc[row]);
      acc[row] = __smlad(odd(w), x13, acc[row]);
    }
  }
  for (size_t row = 0; row < kRows; ++row) {
    out[row] = acc[row];
  }
}

// The same of rows of 4 bits a weight, as `Dense` says.
template <size_t kRows>
inline void dots_halves(const int16_t* x, const int8_t* const (&rows)[kRows], size_t n, int32_t (&out)[kRows]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(x);
  int32_t acc[kRows] = {};
  for (size_t i = 0; i < n / 2; i += 4) {
    if (i % 8 == 0 && i > 0) {
      words += 4;
    }
    int16x2_t pairs[4];  // lanes 0 and 2, 1 and 3, of the upper halves, then of the lower ones
    for (size_t k = 0; k < 2; ++k) {
      const uint32_t a = words[4 * k];
      const uint32_t b = words[4 * k + 1];
      pairs[2 * k] = static_cast<int16x2_t>((a & 0xffff) | (b << 16));
      pairs[2 * k + 1] = static_cast<int16x2_t>((a >> 16) | (b & 0xffff0000));
    }
    words += 2;
    for (size_t row = 0; row < kRows; ++row) {
      const uint32_t both = load4(rows[row] + i);
      const uint32_t above = both & 0xf0f0f0f0;
      const uint32_t below = (both << 4) & 0xf0f0f0f0;
      acc[row] = __smlad(even(above), pairs[0], acc[row]);
      acc[row] = __smlad(odd(above), pairs[1], acc[row]);
      acc[row] = __smlad(even(below), pairs[2], acc[row]);
      acc[row] = __smlad(odd(below), pairs[3], acc[row]);
    }
  }
  for (size_t row = 0; row < kRows; ++row) {
    out[row] = acc[row];
  }
}

// y = x . row, int8 with int8.
inline int32_t dot_narrow(const int8_t* x, const int8_t* row, size_t n) {
  int32_t acc = 0;
  for (; n >= 4; n -= 4, x += 4, row += 4) {
    const uint32_t a = load4(x);
    const uint32_t b = load4(row);
    acc = __smlad(even(a), even(b), acc);
    acc = __smlad(odd(a), odd(b), acc);
  }
  for (; n > 0; --n) {
    acc += static_cast<int32_t>(*x++) * *row++;
  }
  return acc;
}

}  // namespace tinyengine

#endif
