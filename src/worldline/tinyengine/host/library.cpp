// A world behind a C interface: what Python plays, evaluates and plans with.
#include <new>

#include "../world.hpp"

using namespace tinyengine;

namespace {

World& of(void* handle) { return *static_cast<World*>(handle); }

uint8_t code(Status status) { return static_cast<uint8_t>(status); }

}  // namespace

extern "C" {

size_t tinyengine_handle_bytes() { return sizeof(World); }

// The program is the world's from now on, which may rearrange it. `handle` is memory of `tinyengine_handle_bytes()`,
// aligned to 16 bytes as program and arena.
uint8_t tinyengine_open(void* handle, uint8_t* program, size_t size, uint8_t* arena, size_t arena_bytes) {
  return code((new (handle) World())->init(program, size, arena, arena_bytes));
}

size_t tinyengine_latent_size(void* handle) { return of(handle).latent_size(); }
size_t tinyengine_action_size(void* handle) { return of(handle).action_size(); }
size_t tinyengine_memory_size(void* handle) { return of(handle).memory_size(); }
size_t tinyengine_state_size(void* handle) { return of(handle).state_size(); }

uint8_t tinyengine_encode(void* handle, const uint8_t* frames, size_t rows, size_t count, int16_t* z) {
  World& world = of(handle);
  for (size_t i = 0; i < count; ++i, z += world.latent_size()) {
    Status status = Status::ok;
    for (size_t y = 0; y < rows && status == Status::ok; ++y, frames += world.row_bytes()) {
      status = world.push_row(frames);
    }
    status = status == Status::ok ? world.latent(z) : status;
    if (status != Status::ok) {
      return code(status);
    }
  }
  return 0;
}

// Native actions to those that `tinyengine_step` takes.
uint8_t tinyengine_actions(void* handle, const float* native, size_t count, int16_t* out) {
  World& world = of(handle);
  for (size_t i = 0; i < count; ++i, native += world.action_size(), out += world.action_size()) {
    const Status status = world.action(native, out);
    if (status != Status::ok) {
      return code(status);
    }
  }
  return 0;
}

// Every state (latent, then what is remembered) becomes the one a step later.
uint8_t tinyengine_step(void* handle, int16_t* states, const int16_t* actions, size_t count) {
  World& world = of(handle);
  const size_t size = world.state_size();
  for (size_t i = 0; i < count; ++i, states += size, actions += world.action_size()) {
    const Status status = world.begin(states);
    if (status != Status::ok) {
      return code(status);
    }
    __builtin_memcpy(world.state(), states, 2 * size);
    world.step(actions);
    __builtin_memcpy(states, world.state(), 2 * size);
  }
  return 0;
}

uint8_t tinyengine_decode(void* handle, const int16_t* z, size_t count, uint8_t* frames) {
  World& world = of(handle);
  for (size_t i = 0; i < count; ++i, z += world.latent_size()) {
    Status status = world.begin(z);
    if (status == Status::ok) {
      status = world.decode(
          [](void* user, uint32_t, const uint8_t* row, size_t n) {
            uint8_t** to = static_cast<uint8_t**>(user);
            __builtin_memcpy(*to, row, n);
            *to += n;
          },
          static_cast<void*>(&frames));
    }
    if (status != Status::ok) {
      return code(status);
    }
  }
  return 0;
}

uint8_t tinyengine_region(void* handle, const int16_t* z, uint32_t* out) { return code(of(handle).region(z, out)); }
}
