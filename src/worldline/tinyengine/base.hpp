// Types, statuses and the arithmetic that everything else is made of (docs/integer_spec.md).
#ifndef TINYENGINE_BASE_HPP
#define TINYENGINE_BASE_HPP

#include <stddef.h>
#include <stdint.h>

namespace tinyengine {

enum class Status : uint8_t {
  ok = 0,
  not_a_program,  // another file, or another byte order
  other_version,  // of the program's format
  damaged,        // the checksum differs, or the size
  bad_program,    // well kept, but its sizes or places are impossible
  small_arena,    // fewer bytes, or worse aligned, than the program asks for
  wrong_order,    // a call that nothing has prepared
  bad_argument,   // null, or out of range
};

// A channel's bias, in which the input's zero point is accounted for, and its factor multiplier / 2^31 >> shift.
struct Channel {
  int32_t bias;
  int32_t multiplier;
  int32_t shift;
};

// What becomes of a scaled accumulator: zero point added, then clamped.
struct Finish {
  int32_t zero;
  int32_t low;
  int32_t high;
};

template <class T>
constexpr T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}

constexpr int32_t saturate16(int32_t x) { return clamp<int32_t>(x, -32768, 32767); }

constexpr size_t padded(size_t n, size_t to) { return (n + to - 1) / to * to; }

// The product over 2^31, rounded half up; then over 2^shift, rounded half away from zero. shift is 1 to 31.
inline int32_t requantise(int32_t acc, int32_t multiplier, int32_t shift) {
  const int32_t high = static_cast<int32_t>((static_cast<int64_t>(acc) * multiplier + (1 << 30)) >> 31);
  const int32_t half = static_cast<int32_t>(1u << (shift - 1));
  return (high + half + (high >> 31)) >> shift;
}

// The same for any shift from -31 to 31; a negative one is to the left, and goes before.
inline int32_t requantise_any(int32_t acc, int32_t multiplier, int32_t shift) {
  if (shift > 0) {
    return requantise(acc, multiplier, shift);
  }
  const int64_t wide = static_cast<int64_t>(acc) * (static_cast<int64_t>(1) << -shift);
  return static_cast<int32_t>((wide * multiplier + (1 << 30)) >> 31);
}

// The product over 2^shift, rounded half up. shift is 1 to 46.
inline int32_t requantise_wide(int32_t acc, int32_t multiplier, int32_t shift) {
  const int64_t product = static_cast<int64_t>(acc) * multiplier;
  return static_cast<int32_t>((product + (static_cast<int64_t>(1) << (shift - 1))) >> shift);
}

inline int32_t finish(int32_t acc, const Channel& by, const Finish& to) {
  return clamp(requantise(acc, by.multiplier, by.shift) + to.zero, to.low, to.high);
}

// The sum over the count, which is not 0, rounded half away from zero.
inline int32_t average(int32_t total, int32_t count) {
  // NOLINTNEXTLINE(clang-analyzer-core.DivideZero)
  return total > 0 ? (total + count / 2) / count : (total - count / 2) / count;
}

inline uint32_t load4(const void* from) {
  uint32_t word = 0;
  __builtin_memcpy(&word, from, 4);
  return word;
}

inline void store4(void* to, uint32_t word) { __builtin_memcpy(to, &word, 4); }

inline void copy(int8_t* to, const int8_t* from, size_t n) {
  for (; n >= 4; n -= 4, to += 4, from += 4) {
    store4(to, load4(from));
  }
  for (; n > 0; --n) {
    *to++ = *from++;
  }
}

inline void fill(int8_t* to, int8_t value, size_t n) {
  for (; n > 0; --n) {
    *to++ = value;
  }
}

}  // namespace tinyengine

#endif
