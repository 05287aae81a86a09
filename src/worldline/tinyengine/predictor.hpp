// The predictor and the gauge: int16 values, int8 weights, a GRU between them.
#ifndef TINYENGINE_PREDICTOR_HPP
#define TINYENGINE_PREDICTOR_HPP

#include "stage.hpp"

namespace tinyengine {

// A matrix on int16 values, as it lies in a program. Its channels' factors are those of `requantise_wide`. Weights of 4
// bits are int8 whose lower half is 0: of each sixteen, byte j holds the upper halves of weight j, above, and of weight
// 8 + j, below.
struct Dense {
  uint32_t inputs, outputs;
  uint32_t bits;  // 8 or 4
  uint32_t weights_at, by_at;
};

// A native value is clamped, and becomes (value - mean) times factor, rounded half up.
struct Normalising {
  float low, high, mean, factor;
};

// As it lies in a program. Buffers are places in the arena, each of int16 values, with room for a multiple of 16.
struct Predictor {
  uint32_t latent, action, hidden;
  uint32_t actions_at;  // how each native value is normalised
  uint32_t radius;      // of the sphere that latents are put back onto, or 0
  uint32_t tables_at;   // sigmoid and tanh: 513 int16 each, the second 514 behind the first
  Dense embed, input_gates, hidden_gates, from_hidden, from_input, change;
  uint32_t state_at;   // z, then h
  uint32_t joined_at;  // z and action
  uint32_t x_at, next_at, mixed_at;
};

// The decoder's first grid from a latent, in int8, as it lies in a program.
struct Drawing {
  Dense matrix;
  int32_t zero;
};

// How far latents are from where real ones are, and from each other, as it lies in a program.
struct Gauge {
  uint32_t mean_at;   // `latent` int16
  Dense whiten;       // to 1/1024 of a standard deviation
  uint32_t radius99;  // of real latents, in the same unit
  uint32_t white_at;  // in the arena
  uint32_t offset_at;
};

constexpr size_t kTable = 514;

// Straight lines between the entries of a table, one for every 128th argument.
inline int32_t lookup(int32_t x, const int16_t* table) {
  const int32_t i = (x >> 7) + 256;
  return table[i] + (((table[i + 1] - table[i]) * (x & 127) + 64) >> 7);
}

// The largest integer whose square is at most x.
inline uint32_t root(uint64_t x) {
  uint64_t result = 0;
  for (uint64_t bit = uint64_t{1} << 62; bit != 0; bit >>= 2) {
    if (x >= result + bit) {
      x -= result + bit;
      result = (result >> 1) + bit;
    } else {
      result >>= 1;
    }
  }
  return static_cast<uint32_t>(result);
}

inline uint64_t squares(const int16_t* x, size_t n) {
  uint64_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    total += static_cast<uint32_t>(static_cast<int32_t>(x[i]) * x[i]);
  }
  return total;
}

// Put a latent onto the sphere, each value rounded half away from zero.
inline void normalise(int16_t* z, size_t n, uint32_t radius) {
  const uint64_t total = squares(z, n);
  if (total == 0) {
    return;
  }
  const int64_t length = root(total << 16);
  for (size_t i = 0; i < n; ++i) {
    const int64_t product = z[i] * (static_cast<int64_t>(radius) << 8);
    const int64_t quotient = ((product < 0 ? -product : product) + length / 2) / length;
    z[i] = static_cast<int16_t>(clamp<int64_t>(product < 0 ? -quotient : quotient, -32768, 32767));
  }
}

// Matrices of a program, row by row.
class Rows {
 public:
  Rows(const uint8_t* program, const Dense& dense)
      : by_(reinterpret_cast<const Channel*>(program + dense.by_at)),
        weights_(reinterpret_cast<const int8_t*>(program + dense.weights_at)),
        count_(padded(dense.inputs, kRowAlign)),
        stride_(count_ * dense.bits / 8) {}

  // Scaled outputs o, o + step, ... of x, not saturated. `x` has room, and anything, up to a multiple of 16.
  template <size_t kRows>
  void values(const int16_t* x, size_t o, size_t step, int32_t (&out)[kRows]) const {
    const int8_t* rows[kRows];
    for (size_t i = 0; i < kRows; ++i) {
      rows[i] = weights_ + (o + i * step) * stride_;
    }
    if (stride_ == count_) {
      dots_wide(x, rows, count_, out);
    } else {
      dots_halves(x, rows, count_, out);
    }
    for (size_t i = 0; i < kRows; ++i) {
      const Channel& by = by_[o + i * step];
      out[i] = requantise_wide(out[i] + by.bias, by.multiplier, by.shift);
    }
  }

 private:
  const Channel* by_;
  const int8_t* weights_;
  size_t count_;
  size_t stride_;
};

constexpr size_t kAtOnce = 4;  // rows that share the loads of x

// Call `use(o, value)` with every scaled output of a matrix.
template <class Use>
inline void each_output(const uint8_t* program, const Dense& dense, const int16_t* x, const Use& use) {
  const Rows rows(program, dense);
  size_t o = 0;
  for (; o + kAtOnce <= dense.outputs; o += kAtOnce) {
    int32_t values[kAtOnce];
    rows.values(x, o, 1, values);
    for (size_t i = 0; i < kAtOnce; ++i) {
      use(o + i, values[i]);
    }
  }
  for (; o < dense.outputs; ++o) {
    int32_t value[1];
    rows.values(x, o, 1, value);
    use(o, value[0]);
  }
}

inline int16_t relu16(int32_t x) { return static_cast<int16_t>(clamp<int32_t>(x, 0, 32767)); }

// z and h become those one step later.
inline void advance(const uint8_t* program, const Predictor& p, uint8_t* arena, const int16_t* action) {
  int16_t* const z = reinterpret_cast<int16_t*>(arena + p.state_at);
  int16_t* const h = z + padded(p.latent, kRowAlign);
  int16_t* const joined = reinterpret_cast<int16_t*>(arena + p.joined_at);
  int16_t* const x = reinterpret_cast<int16_t*>(arena + p.x_at);
  int16_t* const next = reinterpret_cast<int16_t*>(arena + p.next_at);
  int16_t* const mixed = reinterpret_cast<int16_t*>(arena + p.mixed_at);
  for (size_t i = 0; i < p.latent; ++i) {
    joined[i] = z[i];
  }
  for (size_t i = 0; i < p.action; ++i) {
    joined[p.latent + i] = action[i];
  }
  each_output(program, p.embed, joined, [x](size_t o, int32_t value) { x[o] = relu16(value); });

  const int16_t* const sigmoid = reinterpret_cast<const int16_t*>(program + p.tables_at);
  const int16_t* const tanh = sigmoid + kTable;
  const Rows input(program, p.input_gates);
  const Rows hidden(program, p.hidden_gates);
  for (size_t j = 0; j < p.hidden; ++j) {
    int32_t from_x[3];
    int32_t from_h[3];
    input.values(x, j, p.hidden, from_x);
    hidden.values(h, j, p.hidden, from_h);
    const int32_t reset = lookup(saturate16(from_x[0] + from_h[0]), sigmoid);
    const int32_t update = lookup(saturate16(from_x[1] + from_h[1]), sigmoid);
    const int32_t kept = (reset * saturate16(from_h[2]) + (1 << 14)) >> 15;
    const int32_t fresh = lookup(saturate16(from_x[2] + kept), tanh);
    next[j] = static_cast<int16_t>(saturate16(fresh + ((update * (h[j] - fresh) + (1 << 14)) >> 15)));
  }
  for (size_t j = 0; j < p.hidden; ++j) {
    h[j] = next[j];
  }

  const Rows mix_input(program, p.from_input);
  const Rows mix_hidden(program, p.from_hidden);
  for (size_t o = 0; o < p.hidden; o += kAtOnce) {  // hidden is a multiple of kAtOnce
    int32_t a[kAtOnce];
    int32_t b[kAtOnce];
    mix_hidden.values(h, o, 1, a);
    mix_input.values(x, o, 1, b);
    for (size_t i = 0; i < kAtOnce; ++i) {
      mixed[o + i] = relu16(a[i] + b[i]);
    }
  }
  each_output(program, p.change, mixed,
              [z](size_t o, int32_t value) { z[o] = static_cast<int16_t>(saturate16(z[o] + value)); });
  if (p.radius != 0) {
    normalise(z, p.latent, p.radius);
  }
}

}  // namespace tinyengine

#endif
