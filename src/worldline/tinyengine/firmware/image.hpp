// What the images share: a world, its program and its arena, and pictures that come in row by row.
#ifndef TINYENGINE_FIRMWARE_IMAGE_HPP
#define TINYENGINE_FIRMWARE_IMAGE_HPP

#include "../world.hpp"
#include "board.hpp"

#if defined(TINYENGINE_LINKED)
#include "world_program.hpp"
#endif

namespace image {

#ifndef TINYENGINE_PROGRAM_ROOM
#define TINYENGINE_PROGRAM_ROOM (3 << 20)
#endif
#if defined(TINYENGINE_LINKED)
constexpr size_t kArena = kWorldArenaBytes;
#elif defined(TINYENGINE_ARENA)
constexpr size_t kArena = TINYENGINE_ARENA;
#else
constexpr size_t kArena = 1 << 18;
#endif
#if defined(TINYENGINE_LINKED)
// in flash, as firmware has it
inline const uint8_t* const program = reinterpret_cast<const uint8_t*>(world_program);
#elif defined(TINYENGINE_PROGRAM_AT)
// a place of its own where the board's RAM is too small
inline uint8_t* const program = reinterpret_cast<uint8_t*>(TINYENGINE_PROGRAM_AT);
#else
alignas(16) inline uint8_t program_room[TINYENGINE_PROGRAM_ROOM];
inline uint8_t* const program = program_room;
#endif
alignas(16) inline uint8_t arena[kArena];

constexpr size_t kMost = 256;  // values of a latent or an action
constexpr size_t kRow = 4096;  // bytes of a row
inline uint8_t row[kRow];
inline tinyengine::World world;

// Take the world: what lies in flash, or what program.bin holds. `in` begins with the size of the latter.
inline tinyengine::Status open(const board::File& in) {
  uint32_t size = 0;
  bool ready = in.read(&size, sizeof size);
#if defined(TINYENGINE_LINKED)
  size = kWorldProgramBytes;
#else
  const board::File from("program.bin", 1);
  ready = ready && size <= TINYENGINE_PROGRAM_ROOM && from.read(program, size);
  from.close();
#endif
  if (!ready) {
    board::print("the input or program.bin cannot be read, or the program is larger than its room\n");
    return tinyengine::Status::bad_argument;
  }
  const tinyengine::Status status = world.init(program, size, arena, sizeof arena);
  if (status == tinyengine::Status::ok &&
      (world.latent_size() > kMost || world.action_size() > kMost || world.row_bytes() > kRow)) {
    return tinyengine::Status::small_arena;
  }
  return status;
}

// Whether a whole picture came, and its latent.
inline bool see(const board::File& in, int16_t* latent) {
  for (size_t y = 0; y < world.picture_rows(); ++y) {
    if (!in.read(row, world.row_bytes()) || world.push_row(row) != tinyengine::Status::ok) {
      return false;
    }
  }
  return world.latent(latent) == tinyengine::Status::ok;
}

}  // namespace image

#endif
