// Runs chains of programs that come over semihosting: cases.bin in, results.bin out. For tests and measurements.
#include "../program.hpp"
#include "board.hpp"

using namespace tinyengine;

namespace {

#ifndef TINYENGINE_ROOM
#define TINYENGINE_ROOM (1 << 18)
#endif
constexpr size_t kRoom = TINYENGINE_ROOM;
alignas(16) uint8_t program_room[kRoom];
alignas(16) uint8_t arena_room[kRoom];
alignas(16) uint8_t picture[kRoom];
alignas(16) uint8_t results[kRoom];

struct Case {
  uint32_t program_bytes, arena_bytes, picture_bytes, result_bytes;
};

constexpr size_t kHead = 4;
constexpr uint8_t kPaints[2] = {0xa5, 0x5a};  // a byte written with one of them differs from the other

// What lies beyond it is not the room's: a sanitiser sees a step too far.
uint8_t* last_of(uint8_t* room, size_t n) { return room + kRoom - padded(n, 16); }

Status run(const uint8_t* program, uint8_t* arena, size_t picture_bytes, uint32_t* head) {
  const Chain* chain = reinterpret_cast<const Chain*>(program + reinterpret_cast<const Header*>(program)->encoder_at);
  RowStream stream;
  stream.bind(program, chain, arena);
  const size_t row_bytes = stream.first().in_columns * stream.first().in_channels;
  if (row_bytes * stream.first().in_rows > picture_bytes || chain->num_outputs > kRoom / 2) {
    return Status::bad_argument;
  }
  const int8_t* row = reinterpret_cast<const int8_t*>(picture);
  const Emit emit = [](void*, uint32_t y, const uint8_t* bytes, size_t n) {
    if ((y + 1) * n <= kRoom) {
      __builtin_memcpy(results + y * n, bytes, n);
    }
  };
  board::start_clock();
  while (!stream.full()) {
    copy(stream.next_row(), row, row_bytes);
    row += row_bytes;
    stream.pushed(emit, nullptr);
  }
  if (chain->end == End::flatten || chain->end == End::average) {
    stream.outputs(reinterpret_cast<int16_t*>(results));
  }
  head[1] = static_cast<uint32_t>(board::ticks());
  return Status::ok;
}

}  // namespace

// Per case: sizes, program and picture in; status, ticks, bytes of stack ever used, end of what was written in the
// arena and results out.
extern "C" int main() {
  const board::File in("cases.bin", 1);
  const board::File out("results.bin", 5);
  Case sizes;
  while (in.read(&sizes, sizeof sizes)) {
    const bool fits = sizes.program_bytes <= kRoom && sizes.arena_bytes <= kRoom && sizes.picture_bytes <= kRoom &&
                      sizes.result_bytes <= kRoom;
    uint8_t* program = fits ? last_of(program_room, sizes.program_bytes) : nullptr;
    uint8_t* arena = fits ? last_of(arena_room, sizes.arena_bytes) : nullptr;
    if (!fits || !in.read(program, sizes.program_bytes) || !in.read(picture, sizes.picture_bytes)) {
      board::print("cases.bin: a case is cut off, or larger than its room\n");
      return 1;
    }
    const Status status = take(program, sizes.program_bytes, arena, sizes.arena_bytes);
    uint32_t head[kHead] = {static_cast<uint32_t>(status), 0, 0, 0};
    for (size_t i = 0; status == Status::ok && i < 2; ++i) {
      fill(reinterpret_cast<int8_t*>(arena), static_cast<int8_t>(kPaints[i]), sizes.arena_bytes);
      head[0] = static_cast<uint32_t>(run(program, arena, sizes.picture_bytes, head));
      uint32_t end = sizes.arena_bytes;
      while (end > head[3] && arena[end - 1] == kPaints[i]) {
        --end;
      }
      head[3] = end;
    }
    head[2] = static_cast<uint32_t>(board::stack_used());
    if (!out.write(head, sizeof head) || !out.write(results, sizes.result_bytes)) {
      return 1;
    }
  }
  out.close();
  return 0;
}
