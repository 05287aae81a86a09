// Plays a recorded session again: program.bin and session.bin in, the chain of hashes after every frame out
// (chains.bin). No picture is ever whole in memory: rows are hashed as they are made.
#include "../blake2b.hpp"
#include "../world.hpp"
#include "board.hpp"

using namespace tinyengine;

namespace {

#ifndef TINYENGINE_PROGRAM_ROOM
#define TINYENGINE_PROGRAM_ROOM (3 << 20)
#endif
#ifndef TINYENGINE_ARENA
#define TINYENGINE_ARENA (1 << 18)
#endif
#ifdef TINYENGINE_PROGRAM_AT
uint8_t* const program = reinterpret_cast<uint8_t*>(TINYENGINE_PROGRAM_AT);
#else
alignas(16) uint8_t program_room[TINYENGINE_PROGRAM_ROOM];
uint8_t* const program = program_room;
#endif
alignas(16) uint8_t arena[TINYENGINE_ARENA];

constexpr size_t kMost = 256;
constexpr size_t kRow = 4096;
constexpr size_t kPrefix = 4096;
int16_t latent[kMost];
int16_t action[kMost];
float native[kMost];
uint8_t row[kRow];
uint8_t prefix[kPrefix];
World world;

enum Kind : uint32_t { begin = 0, step = 1, anchor = 2 };

// What precedes each event's values.
struct Event {
  uint32_t kind;
  uint32_t prefix_bytes;  // of what the chain takes in before the hashes
  uint32_t pictures;      // begin: of the context; anchor: 1
  uint32_t rows;
};

bool see(const board::File& in, uint32_t rows) {
  for (uint32_t y = 0; y < rows; ++y) {
    if (!in.read(row, world.row_bytes()) || world.push_row(row) != Status::ok) {
      return false;
    }
  }
  return world.latent(latent) == Status::ok;
}

bool act(const board::File& in) {
  return in.read(native, sizeof(float) * world.action_size()) && world.action(native, action) == Status::ok &&
         world.step(action) == Status::ok;
}

bool happen(const board::File& in, const Event& event) {
  switch (event.kind) {
    case begin:
      for (uint32_t i = 0; i < event.pictures; ++i) {
        if ((i > 0 && !act(in)) || !see(in, event.rows) ||
            (i > 0 ? world.observe(latent) : world.begin(latent)) != Status::ok) {
          return false;
        }
      }
      return true;
    case step:
      return act(in);
    case anchor:
      return see(in, event.rows) && world.observe(latent) == Status::ok;
    default:
      return false;
  }
}

bool draw(uint8_t* digest) {
  Blake2b hash;
  const Status status = world.decode(
      [](void* user, uint32_t, const uint8_t* bytes, size_t n) { static_cast<Blake2b*>(user)->update(bytes, n); },
      &hash);
  hash.finish(digest);
  return status == Status::ok;
}

void mark(const int16_t* values, size_t n, uint8_t* digest) {
  Blake2b hash;
  hash.update(values, 2 * n);
  hash.finish(digest);
}

}  // namespace

extern "C" int main() {
  board::File in("session.bin", 1);
  board::File out("chains.bin", 5);
  board::File from("program.bin", 1);
  uint32_t size = 0;
  uint8_t chain[Blake2b::kBytes];
  if (!in.read(&size, sizeof size) || size > TINYENGINE_PROGRAM_ROOM || !from.read(program, size) ||
      !in.read(chain, sizeof chain)) {
    board::print("session.bin or program.bin cannot be read, or the program is larger than its room\n");
    return 1;
  }
  if (world.init(program, size, arena, sizeof arena) != Status::ok || world.latent_size() > kMost ||
      world.action_size() > kMost || world.row_bytes() > kRow) {
    board::print("the program was refused\n");
    return 1;
  }
  Event event;
  while (in.read(&event, sizeof event)) {
    uint8_t digests[3][Blake2b::kBytes];  // of the picture, the latent, and the memory
    if (event.prefix_bytes > kPrefix || !in.read(prefix, event.prefix_bytes) || !happen(in, event) ||
        !draw(digests[0])) {
      board::print("session.bin holds an event that cannot be played\n");
      return 1;
    }
    mark(world.state(), world.latent_size(), digests[1]);
    mark(world.memory(), world.memory_size(), digests[2]);
    Blake2b hash;
    hash.update(chain, sizeof chain);
    hash.update(prefix, event.prefix_bytes);
    hash.update(digests, sizeof digests);
    hash.finish(chain);
    out.write(chain, sizeof chain);
  }
  out.close();
  return 0;
}
