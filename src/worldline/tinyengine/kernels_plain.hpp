// What plain C++ does well enough, for the variants whose compiler finds the vectors in it.
#ifndef TINYENGINE_KERNELS_PLAIN_HPP
#define TINYENGINE_KERNELS_PLAIN_HPP

#include "base.hpp"

namespace tinyengine {

// One pixel of a depthwise convolution; weights are [tap][channel].
template <class To>
void depthwise_pixel(const int8_t* const* taps, size_t num_taps, const int16_t* weights, const Channel* by,
                     size_t channels, const Finish& to, const To& out) {
  for (size_t c = 0; c < channels; ++c) {
    int32_t acc = by[c].bias;
    for (size_t t = 0; t < num_taps; ++t) {
      acc += taps[t][c] * weights[t * channels + c];
    }
    out.put(c, finish(acc, by[c], to));
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

// The same of rows of 4 bits a weight, as `Dense` says.
template <size_t kRows>
inline void dots_halves(const int16_t* x, const int8_t* const (&rows)[kRows], size_t n, int32_t (&out)[kRows]) {
  for (size_t row = 0; row < kRows; ++row) {
    int32_t acc = 0;
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(rows[row]);
    for (size_t i = 0; i < n; i += 16, bytes += 8) {
      for (size_t j = 0; j < 8; ++j) {
        acc += x[i + j] * static_cast<int8_t>(bytes[j] & 0xf0);
        acc += x[i + 8 + j] * static_cast<int8_t>(static_cast<uint8_t>(bytes[j] << 4));
      }
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
