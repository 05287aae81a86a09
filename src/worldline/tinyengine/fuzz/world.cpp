// Any bytes as a program, and any order of calls: nothing may be read or written outside (libFuzzer, with sanitisers).
#include <stdlib.h>
#include <string.h>

#include "../planner.hpp"

using namespace tinyengine;

namespace {

constexpr size_t kMostArena = 1 << 20;
constexpr uint32_t kMostWork = 1 << 22;  // rows times columns times channels of a stage: what takes too long is skipped

bool quick(const uint8_t* program) {
  const Header& header = *reinterpret_cast<const Header*>(program);
  const uint32_t chains[] = {header.encoder_at, header.decoder_at};
  uint64_t work = 0;
  for (uint32_t at : chains) {
    const Chain* chain = at != 0 ? reinterpret_cast<const Chain*>(program + at) : nullptr;
    for (size_t i = 0; chain != nullptr && i < chain->num_stages; ++i) {
      const Stage& s = reinterpret_cast<const Stage*>(program + chain->stages_at)[i];
      work += uint64_t{s.rows} * s.columns * s.channels * (s.depth + s.kernel * s.kernel);
    }
  }
  return work < kMostWork;
}

void* aligned(size_t n) {
  void* memory = nullptr;
  return posix_memalign(&memory, 16, n != 0 ? n : 16) == 0 ? memory : nullptr;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < sizeof(Header) + 16) {
    return 0;
  }
  // the last bytes are the calls; what a checksum would hide is put right
  const uint8_t* calls = data + size - 16;
  size -= 16;
  uint8_t* program = static_cast<uint8_t*>(aligned(size));
  memcpy(program, data, size);
  Header header;
  memcpy(&header, program, sizeof header);
  memcpy(header.magic, "worldtin", 8);
  header.version = kVersion;
  header.size_bytes = static_cast<uint32_t>(size);
  header.checksum = crc32(program + sizeof header, size - sizeof header);
  memcpy(program, &header, sizeof header);
  if (header.arena_bytes <= kMostArena) {
    uint8_t* arena = static_cast<uint8_t*>(aligned(header.arena_bytes));
    World world;
    if (check(program, size, arena, header.arena_bytes) == Status::ok && quick(program) &&
        world.init(program, size, arena, header.arena_bytes) == Status::ok) {
      int16_t* z = static_cast<int16_t*>(calloc(8192, 2));
      uint8_t* row = static_cast<uint8_t*>(calloc(world.row_bytes() + 1, 1));
      alignas(8) static uint8_t memory[1 << 16];
      static float native[4096];
      uint32_t score = 0;
      for (size_t i = 0; i < 16; ++i) {
        switch (calls[i] % 8) {
          case 0:
            for (size_t y = 0; y < calls[i]; ++y) {
              world.push_row(row);
            }
            break;
          case 1:
            if (world.seen() && world.latent_size() > 0) {
              world.latent(z);
            }
            break;
          case 2:
            world.begin(z);
            break;
          case 3:
            world.observe(z);
            break;
          case 4:
            if (world.native_action(z, native) == Status::ok) {
              world.action(native, z);
            }
            world.rollout(z, 2, nullptr);
            break;
          case 5:
            world.decode([](void*, uint32_t, const uint8_t* bytes, size_t n) { (void)(bytes[0] + bytes[n - 1]); },
                         nullptr);
            break;
          case 6:
            world.region(z, &score);
            world.drift(z, z, &score);
            break;
          default: {
            const Budget budget = {4, 2, 1, 2, calls[i], 1000, 10};
            if (world.action_size() * 2 <= 8192) {
              Planner::plan(world, z, budget, memory, sizeof memory, z, nullptr);
            }
          }
        }
      }
      free(z);
      free(row);
    }
    free(arena);
  }
  free(program);
  return 0;
}
