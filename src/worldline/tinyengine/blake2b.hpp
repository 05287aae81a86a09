// BLAKE2b with digests of 16 bytes (RFC 7693): the hash that recordings of sessions are chained with.
#ifndef TINYENGINE_BLAKE2B_HPP
#define TINYENGINE_BLAKE2B_HPP

#include "base.hpp"

namespace tinyengine {

class Blake2b {
 public:
  static constexpr size_t kBytes = 16;

  Blake2b() {
    for (size_t i = 0; i < 8; ++i) {
      h_[i] = kStart[i];
    }
    h_[0] ^= 0x01010000 ^ kBytes;
  }

  void update(const void* data, size_t n) {
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    for (; n > 0; --n) {
      if (filled_ == sizeof block_) {
        total_ += sizeof block_;
        compress(false);
        filled_ = 0;
      }
      block_[filled_++] = *bytes++;
    }
  }

  void finish(uint8_t* digest) {
    total_ += filled_;
    while (filled_ < sizeof block_) {
      block_[filled_++] = 0;
    }
    compress(true);
    for (size_t i = 0; i < kBytes; ++i) {
      digest[i] = static_cast<uint8_t>(h_[i / 8] >> (8 * (i % 8)));
    }
  }

 private:
  static constexpr uint64_t kStart[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                         0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                         0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
  static constexpr uint8_t kOrder[10][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

  static uint64_t turned(uint64_t x, unsigned by) { return (x >> by) | (x << (64 - by)); }

  static void mix(uint64_t* v, size_t a, size_t b, size_t c, size_t d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x;
    v[d] = turned(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = turned(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = turned(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = turned(v[b] ^ v[c], 63);
  }

  void compress(bool last) {
    uint64_t v[16];
    uint64_t m[16];
    for (size_t i = 0; i < 8; ++i) {
      v[i] = h_[i];
      v[i + 8] = kStart[i];
    }
    v[12] ^= total_;
    v[14] = last ? ~v[14] : v[14];
    for (size_t i = 0; i < 16; ++i) {
      m[i] = 0;
      for (size_t k = 8; k > 0; --k) {
        m[i] = (m[i] << 8) | block_[8 * i + k - 1];
      }
    }
    for (size_t round = 0; round < 12; ++round) {
      const uint8_t* order = kOrder[round % 10];
      for (size_t i = 0; i < 4; ++i) {
        mix(v, i, 4 + i, 8 + i, 12 + i, m[order[2 * i]], m[order[2 * i + 1]]);
      }
      for (size_t i = 0; i < 4; ++i) {
        mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[order[8 + 2 * i]], m[order[9 + 2 * i]]);
      }
    }
    for (size_t i = 0; i < 8; ++i) {
      h_[i] ^= v[i] ^ v[i + 8];
    }
  }

  uint64_t h_[8];
  uint64_t total_ = 0;
  uint8_t block_[128];
  size_t filled_ = 0;
};

}  // namespace tinyengine

#endif
