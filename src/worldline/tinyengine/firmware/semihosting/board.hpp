// What an image wants of a Cortex-M board: files and an exit by semihosting, a count of instructions, the stack's
// depth.
#ifndef TINYENGINE_FIRMWARE_SEMIHOSTING_BOARD_HPP
#define TINYENGINE_FIRMWARE_SEMIHOSTING_BOARD_HPP

#include <stddef.h>
#include <stdint.h>

namespace board {

inline void open() {}

inline int semihost(int operation, const void* arguments) {
  register int r0 asm("r0") = operation;
  register const void* r1 asm("r1") = arguments;
  asm volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

// A file of the machine that the debugger or QEMU runs on.
class File {
 public:
  // mode: 1 reads, 5 writes anew (both binary).
  File(const char* path, int mode) {
    size_t length = 0;
    while (path[length] != 0) {
      ++length;
    }
    const uint32_t arguments[] = {reinterpret_cast<uintptr_t>(path), static_cast<uint32_t>(mode), length};
    handle_ = semihost(0x01, arguments);
  }

  // Whether all bytes came.
  bool read(void* to, size_t n) const {
    const uint32_t arguments[] = {static_cast<uint32_t>(handle_), reinterpret_cast<uintptr_t>(to), n};
    return handle_ >= 0 && semihost(0x06, arguments) == 0;
  }

  bool write(const void* from, size_t n) const {
    const uint32_t arguments[] = {static_cast<uint32_t>(handle_), reinterpret_cast<uintptr_t>(from), n};
    return handle_ >= 0 && semihost(0x05, arguments) == 0;
  }

  void close() const {
    const uint32_t arguments[] = {static_cast<uint32_t>(handle_)};
    semihost(0x02, arguments);
  }

 private:
  int handle_;
};

inline void print(const char* text) { semihost(0x04, text); }

[[noreturn]] inline void leave(int code) {
  const uint32_t arguments[] = {0x20026, static_cast<uint32_t>(code)};  // ADP_Stopped_ApplicationExit
  semihost(0x20, arguments);
  for (;;) {
  }
}

// Ticks of SysTick since `start_clock`; under QEMU's -icount a tick is a fixed number of instructions.
void start_clock();
uint64_t ticks();

// Bytes of the stack that were ever written since start-up.
size_t stack_used();

}  // namespace board

#endif
