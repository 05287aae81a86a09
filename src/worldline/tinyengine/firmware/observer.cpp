// Watches: pictures and actions come in, and out comes how far off what was imagined is (observer.bin, drift.bin).
#include "image.hpp"

using namespace tinyengine;
using image::world;

namespace {

int16_t latent[image::kMost];
int16_t action[image::kMost];
float native[image::kMost];

// The input's head.
struct Plan {
  uint32_t context;  // pictures that are taken in one by one at the beginning
  uint32_t ahead;    // steps imagined from each picture that is taken in later
};

struct Answer {
  uint32_t status;
  uint32_t steps;   // imagined since a picture was taken in
  uint32_t drift;   // of the imagined latent from the observed one, in 1/256 of the variance of real ones
  uint32_t region;  // of the imagined latent, in 1/256 of what 99 % of real ones keep within
};

}  // namespace

// For every frame: the native action before it (of the first one too, unused) and its rows in; answer and latent out.
extern "C" int main() {
  const board::File in("observer.bin", 1);
  const board::File out("drift.bin", 5);
  Plan plan = {};
  if (image::open(in) != Status::ok || !in.read(&plan, sizeof plan)) {
    board::print("the program was refused\n");
    return 1;
  }
  uint32_t steps = 0;
  for (uint32_t t = 0; in.read(native, sizeof(float) * world.action_size()) && image::see(in, latent); ++t) {
    Answer answer = {};
    Status status = Status::ok;
    if (t == 0) {
      status = world.begin(latent);
    } else {
      ++steps;
      status = world.action(native, action);
      status = status == Status::ok ? world.step(action) : status;
    }
    status = status == Status::ok ? world.drift(world.state(), latent, &answer.drift) : status;
    status = status == Status::ok ? world.region(world.state(), &answer.region) : status;
    answer.steps = steps;
    if (status == Status::ok && (t < plan.context || steps >= plan.ahead)) {
      status = world.observe(latent);
      steps = 0;
    }
    answer.status = static_cast<uint32_t>(status);
    out.write(&answer, sizeof answer);
    out.write(latent, 2 * world.latent_size());
  }
  const uint32_t stack = static_cast<uint32_t>(board::stack_used());
  out.write(&stack, sizeof stack);
  out.close();
  return 0;
}
