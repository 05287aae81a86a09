// Plays a recorded session again: program.bin and session.bin in, the chain of hashes after every frame out
// (chains.bin). No picture is ever whole in memory: rows are hashed as they are made.
#include "../blake2b.hpp"
#include "image.hpp"

using namespace tinyengine;
using image::world;

namespace {

constexpr size_t kPrefix = 4096;
int16_t latent[image::kMost];
int16_t action[image::kMost];
float native[image::kMost];
uint8_t prefix[kPrefix];

enum Kind : uint32_t { begin = 0, step = 1, anchor = 2 };

// What precedes each event's values.
struct Event {
  uint32_t kind;
  uint32_t prefix_bytes;  // of what the chain takes in before the hashes
  uint32_t pictures;      // begin: of the context; anchor: 1
};

bool act(const board::File& in) {
  return in.read(native, sizeof(float) * world.action_size()) && world.action(native, action) == Status::ok &&
         world.step(action) == Status::ok;
}

bool happen(const board::File& in, const Event& event) {
  switch (event.kind) {
    case begin:
      for (uint32_t i = 0; i < event.pictures; ++i) {
        if ((i > 0 && !act(in)) || !image::see(in, latent) ||
            (i > 0 ? world.observe(latent) : world.begin(latent)) != Status::ok) {
          return false;
        }
      }
      return true;
    case step:
      return act(in);
    case anchor:
      return image::see(in, latent) && world.observe(latent) == Status::ok;
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
  const board::File in("session.bin", 1);
  const board::File out("chains.bin", 5);
  uint8_t chain[Blake2b::kBytes];
  if (image::open(in) != Status::ok || !in.read(chain, sizeof chain)) {
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
  const uint32_t stack = static_cast<uint32_t>(board::stack_used());
  out.write(&stack, sizeof stack);
  out.close();
  return 0;
}
