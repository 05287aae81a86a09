// The same interface as semihosting/board.hpp without a debugger, for an STM32F4: all goes over one serial line, USART3
// on PD8 (out) and PD9 (in), 115,200 baud, 8N1: on a NUCLEO-F429ZI the one behind its USB plug. The processor runs as
// it wakes, from its own oscillator of 16 MHz.
//
// The board asks: a letter and four bytes of length, low first. `?`: so many bytes of the input, please. `!`: so many
// of the output follow. `#`: of text. `.`: the end, with an exit status. Until somebody answers it says `+` alone.
#ifndef TINYENGINE_FIRMWARE_STM32F4_BOARD_HPP
#define TINYENGINE_FIRMWARE_STM32F4_BOARD_HPP

#include <stddef.h>
#include <stdint.h>

namespace board {

constexpr uint32_t kClockHz = 16000000;
constexpr uint32_t kBaud = 115200;

inline volatile uint32_t& io(uintptr_t at) { return *reinterpret_cast<volatile uint32_t*>(at); }

// RM0090: reset and clocks, port D, USART3.
constexpr uintptr_t kPortClocks = 0x40023830, kLineClocks = 0x40023840, kPortMode = 0x40020c00,
                    kPortFunction = 0x40020c24, kLineStatus = 0x40004800, kLineData = 0x40004804,
                    kLineRate = 0x40004808, kLineControl = 0x4000480c;
constexpr uint32_t kReceived = 1u << 5, kEmpty = 1u << 7;

inline void put(uint8_t byte) {
  while ((io(kLineStatus) & kEmpty) == 0) {
  }
  io(kLineData) = byte;
}

inline uint8_t get() {
  while ((io(kLineStatus) & kReceived) == 0) {
  }
  return static_cast<uint8_t>(io(kLineData));
}

inline void say(char kind, uint32_t length) {
  put(static_cast<uint8_t>(kind));
  for (size_t i = 0; i < 4; ++i) {
    put(static_cast<uint8_t>(length >> (8 * i)));
  }
}

// Set the line up, and wait until somebody is there.
inline void open() {
  io(kPortClocks) = io(kPortClocks) | (1u << 3);
  io(kLineClocks) = io(kLineClocks) | (1u << 18);
  io(kPortFunction) = (io(kPortFunction) & ~0xffu) | 0x77u;
  io(kPortMode) = (io(kPortMode) & ~(0xfu << 16)) | (0xau << 16);
  io(kLineRate) = (kClockHz + kBaud / 2) / kBaud;
  io(kLineControl) = (1u << 13) | (1u << 3) | (1u << 2);
  for (;;) {
    put('+');
    for (uint32_t i = kClockHz / 64; i > 0; --i) {
      if ((io(kLineStatus) & kReceived) != 0) {
        get();
        return;
      }
    }
  }
}

// The input, or the output: there is one of each.
class File {
 public:
  File(const char*, int) {}

  bool read(void* to, size_t n) const {
    say('?', static_cast<uint32_t>(n));
    uint8_t* bytes = static_cast<uint8_t*>(to);
    for (size_t i = 0; i < n; ++i) {
      bytes[i] = get();
    }
    return true;
  }

  bool write(const void* from, size_t n) const {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    say('!', static_cast<uint32_t>(n));
    for (size_t i = 0; i < n; ++i) {
      put(bytes[i]);
    }
    return true;
  }

  void close() const {}
};

inline void print(const char* text) {
  uint32_t length = 0;
  while (text[length] != 0) {
    ++length;
  }
  say('#', length);
  for (size_t i = 0; i < length; ++i) {
    put(static_cast<uint8_t>(text[i]));
  }
}

[[noreturn]] inline void leave(int code) {
  say('.', static_cast<uint32_t>(code));
  for (;;) {
  }
}

// As in semihosting/board.hpp.
void start_clock();
uint64_t ticks();
size_t stack_used();

}  // namespace board

#endif
