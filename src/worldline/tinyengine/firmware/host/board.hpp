// The same interface as semihosting/board.hpp, on the machine that compiles: files are files, and time stands still.
#ifndef TINYENGINE_FIRMWARE_HOST_BOARD_HPP
#define TINYENGINE_FIRMWARE_HOST_BOARD_HPP

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

namespace board {

class File {
 public:
  File(const char* path, int mode) : file_(fopen(path, mode == 1 ? "rb" : "wb")) {}
  bool read(void* to, size_t n) const { return file_ != nullptr && fread(to, 1, n, file_) == n; }
  bool write(const void* from, size_t n) const { return file_ != nullptr && fwrite(from, 1, n, file_) == n; }
  void close() const {
    if (file_ != nullptr && fclose(file_) != 0) {
      exit(1);
    }
  }

 private:
  FILE* file_;
};

inline void print(const char* text) { (void)fputs(text, stderr); }
[[noreturn]] inline void leave(int code) { exit(code); }
inline void start_clock() {}
inline uint64_t ticks() { return 0; }
inline size_t stack_used() { return 0; }

}  // namespace board

#endif
