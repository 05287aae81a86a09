// Runs a world by commands that come over semihosting: program.bin and commands.bin in, results.bin out.
#include "../planner.hpp"
#include "image.hpp"

using namespace tinyengine;
using image::world;

namespace {

constexpr size_t kMost = image::kMost;
constexpr size_t kMemory = 16384;  // of the planner
int16_t values[kMost];
int16_t planned[kMost];
uint64_t cost;
alignas(8) uint8_t memory[kMemory];

enum Command : uint32_t { picture = 1, begin = 2, observe = 3, step = 4, decode = 5, region = 6, drift = 7, plan = 8 };

struct Reply {
  uint32_t status, ticks;
};

Status run(const board::File& in, const board::File& out, uint32_t command, uint32_t rows) {
  const size_t latent = world.latent_size();
  Status status = Status::bad_argument;
  if (command == picture) {
    uint64_t spent = 0;
    for (uint32_t y = 0; y < rows; ++y) {
      if (!in.read(image::row, world.row_bytes())) {
        return Status::bad_argument;
      }
      board::start_clock();
      status = world.push_row(image::row);
      spent += board::ticks();
    }
    board::start_clock();
    if (status == Status::ok) {
      status = world.latent(values);
    }
    const Reply reply = {static_cast<uint32_t>(status), static_cast<uint32_t>(spent + board::ticks())};
    out.write(&reply, sizeof reply);
    out.write(values, 2 * latent);
    return status;
  }
  const bool given = command == begin || command == observe || command == step || command == drift;
  if (given && !in.read(values, 2 * (command == step ? world.action_size() : latent))) {
    return Status::bad_argument;
  }
  Budget budget = {};
  if (command == plan && (!in.read(&budget, sizeof budget) || !in.read(values, 2 * latent) ||
                          budget.horizon * world.action_size() > kMost)) {
    return Status::bad_argument;
  }
  uint32_t score = 0;
  Reply reply = {0, 0};
  board::start_clock();
  switch (command) {
    case begin:
      status = world.begin(values);
      break;
    case observe:
      status = world.observe(values);
      break;
    case step:
      status = world.step(values);
      break;
    case region:
      status = world.region(world.state(), &score);
      break;
    case plan:
      status = Planner::plan(world, values, budget, memory, sizeof memory, planned, &cost);
      break;
    case drift:
      status = world.drift(world.state(), values, &score);
      break;
    case decode:
      // ticks include the writing of rows
      status = world.decode([](void* user, uint32_t, const uint8_t* bytes,
                               size_t n) { static_cast<const board::File*>(user)->write(bytes, n); },
                            const_cast<board::File*>(&out));
      break;
    default:
      break;
  }
  reply = {static_cast<uint32_t>(status), static_cast<uint32_t>(board::ticks())};
  out.write(&reply, sizeof reply);
  if (command == step) {
    out.write(world.state(), 2 * latent);
  } else if (command == plan) {
    out.write(planned, 2 * budget.horizon * world.action_size());
    out.write(&cost, sizeof cost);
  } else if (command == region || command == drift) {
    out.write(&score, sizeof score);
  }
  return status;
}

}  // namespace

// Commands are pairs (command, rows of a picture), each with its values behind it. Replies are status, ticks and
// values; those of `decode` come behind the picture. At the end: the bytes of stack that were used.
extern "C" int main() {
  const board::File in("commands.bin", 1);
  const board::File out("results.bin", 5);
  const Status status = image::open(in);
  const uint32_t code = static_cast<uint32_t>(status);
  out.write(&code, sizeof code);
  uint32_t command[2];
  if (status == Status::ok) {
    while (in.read(command, sizeof command)) {
      if (run(in, out, command[0], command[1]) == Status::bad_argument) {
        board::print("commands.bin holds a command that is cut off or unknown\n");
        return 1;
      }
    }
  }
  const uint32_t stack = static_cast<uint32_t>(board::stack_used());
  out.write(&stack, sizeof stack);
  out.close();
  return 0;
}
