// Plans: a goal's picture comes in, then pictures of the present, and out come actions (goal.bin, actions.bin).
#include "../planner.hpp"

#include "image.hpp"

using namespace tinyengine;
using image::world;

namespace {

#ifndef TINYENGINE_PLANNED
#define TINYENGINE_PLANNED 256
#endif
#ifndef TINYENGINE_PLANNER_MEMORY
#define TINYENGINE_PLANNER_MEMORY 8192
#endif
int16_t latent[image::kMost];
int16_t goal[image::kMost];
int16_t planned[TINYENGINE_PLANNED];
float native[image::kMost];
alignas(8) uint8_t memory[TINYENGINE_PLANNER_MEMORY];

struct Answer {
  uint32_t status;
  uint32_t reserved;
  uint64_t cost;
};

}  // namespace

// A budget and the goal's rows in; then for every frame its rows in, and out answer, plan, and its first action in the
// world's own units, which is taken to have been done before the next frame.
extern "C" int main() {
  const board::File in("goal.bin", 1);
  const board::File out("actions.bin", 5);
  Budget budget = {};
  if (image::open(in) != Status::ok || !in.read(&budget, sizeof budget) || !image::see(in, goal) ||
      budget.horizon > TINYENGINE_PLANNED / world.action_size()) {
    board::print("the program was refused, or the budget is too large\n");
    return 1;
  }
  for (bool first = true; image::see(in, latent); first = false) {
    Answer answer = {};
    Status status = first ? world.begin(latent) : world.observe(latent);
    if (status == Status::ok) {
      status = Planner::plan(world, goal, budget, memory, sizeof memory, planned, &answer.cost);
    }
    status = status == Status::ok ? world.native_action(planned, native) : status;
    status = status == Status::ok ? world.step(planned) : status;
    answer.status = static_cast<uint32_t>(status);
    out.write(&answer, sizeof answer);
    out.write(planned, 2 * budget.horizon * world.action_size());
    out.write(native, sizeof(float) * world.action_size());
  }
  const uint32_t stack = static_cast<uint32_t>(board::stack_used());
  out.write(&stack, sizeof stack);
  out.close();
  return 0;
}
