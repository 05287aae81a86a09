// Planning by the cross-entropy method, in integers: actions whose imagined latents come near a goal's.
#ifndef TINYENGINE_PLANNER_HPP
#define TINYENGINE_PLANNER_HPP

#include "world.hpp"

namespace tinyengine {

struct Budget {
  uint32_t samples, elites, iterations, horizon;
  uint32_t seed;
  uint32_t spread;  // standard deviation of the first samples, in the unit of actions
  uint32_t least;   // below it no deviation falls
};

constexpr uint32_t kMostPlanned = 1024;

// Marsaglia's xorshift with 32 bits.
class Noise {
 public:
  explicit Noise(uint32_t seed) : x_(seed != 0 ? seed : 1) {}

  // About normal, in 1/4096 of a standard deviation: the sum of four uniform values.
  int32_t normal() {
    int32_t total = -4 * 32768;
    for (size_t i = 0; i < 4; ++i) {
      x_ ^= x_ << 13;
      x_ ^= x_ >> 17;
      x_ ^= x_ << 5;
      total += static_cast<int32_t>(x_ >> 16);
    }
    return (total * 7094 + (1 << 15)) >> 16;
  }

 private:
  uint32_t x_;
};

class Planner {
 public:
  // Bytes of memory that `plan` wants, aligned to 8.
  static size_t memory_bytes(const World& world, const Budget& budget) {
    const size_t values = budget.horizon * world.action_size();
    return padded(8 * budget.elites, 8) +
           2 * (world.state_size() + values * (3 + budget.elites) + 2 * world.action_size());
  }

  // Plan from the world's present state, which stays as it is. `actions` takes `horizon` actions; `cost` (or null) what
  // the best sample costs: the sum over steps of squared distances to `goal`, in the latents' unit.
  static Status plan(World& world, const int16_t* goal, const Budget& budget, uint8_t* memory, size_t bytes,
                     int16_t* actions, uint64_t* cost) {
    if (!world.started()) {
      return Status::wrong_order;
    }
    const bool sizes = budget.samples >= 1 && budget.samples <= kMostPlanned && budget.elites >= 1 &&
                       budget.elites <= budget.samples && budget.iterations >= 1 && budget.iterations <= kMostPlanned &&
                       budget.horizon >= 1 && budget.horizon <= kMostPlanned && budget.spread <= 32767 &&
                       budget.least <= budget.spread;
    if (!sizes || goal == nullptr || memory == nullptr || actions == nullptr ||
        reinterpret_cast<uintptr_t>(memory) % 8 != 0) {
      return Status::bad_argument;
    }
    if (bytes < memory_bytes(world, budget)) {
      return Status::small_arena;
    }
    Planner planner(world, goal, budget, memory);
    const Status status = planner.search(actions, cost);
    planner.restore();
    return status;
  }

 private:
  Planner(World& world, const int16_t* goal, const Budget& budget, uint8_t* memory)
      : world_(world), goal_(goal), budget_(budget), values_(budget.horizon * world.action_size()) {
    costs_ = reinterpret_cast<uint64_t*>(memory);
    saved_ = reinterpret_cast<int16_t*>(memory + padded(8 * budget.elites, 8));
    mean_ = saved_ + world.state_size();
    deviation_ = mean_ + values_;
    sample_ = deviation_ + values_;
    elites_ = sample_ + values_;
    low_ = elites_ + values_ * budget.elites;
    high_ = low_ + world.action_size();
    for (size_t i = 0; i < world.state_size(); ++i) {
      saved_[i] = world.state()[i];
    }
  }

  void restore() {
    for (size_t i = 0; i < world_.state_size(); ++i) {
      world_.state()[i] = saved_[i];
    }
  }

  Status search(int16_t* actions, uint64_t* cost) {
    world_.action_bounds(low_, high_);
    const size_t width = world_.action_size();
    for (size_t i = 0; i < values_; ++i) {
      mean_[i] = static_cast<int16_t>(average(low_[i % width] + high_[i % width], 2));
      deviation_[i] = static_cast<int16_t>(budget_.spread);
    }
    Noise noise(budget_.seed);
    uint64_t best = ~uint64_t{0};
    for (uint32_t iteration = 0; iteration < budget_.iterations; ++iteration) {
      size_t kept = 0;
      for (uint32_t n = 0; n < budget_.samples; ++n) {
        for (size_t i = 0; i < values_; ++i) {  // the first sample is the mean
          const int32_t offset = n == 0 ? 0 : (deviation_[i] * noise.normal() + (1 << 11)) >> 12;
          const int32_t low = low_[i % width];
          const int32_t high = high_[i % width];
          sample_[i] = static_cast<int16_t>(clamp(mean_[i] + offset, low, high));
        }
        uint64_t found = 0;
        const Status status = imagine(&found);
        if (status != Status::ok) {
          return status;
        }
        best = found < best ? found : best;
        keep(found, &kept);
      }
      refit();
    }
    for (size_t i = 0; i < values_; ++i) {
      actions[i] = mean_[i];
    }
    if (cost != nullptr) {
      *cost = best;
    }
    return Status::ok;
  }

  Status imagine(uint64_t* cost) {
    restore();
    for (uint32_t t = 0; t < budget_.horizon; ++t) {
      const Status status = world_.step(sample_ + t * world_.action_size());
      if (status != Status::ok) {
        return status;
      }
      for (size_t i = 0; i < world_.latent_size(); ++i) {
        const int64_t off = world_.state()[i] - goal_[i];
        *cost += static_cast<uint64_t>(off * off);
      }
    }
    return Status::ok;
  }

  // Keep a sample that is better than the worst of those kept; of equals, the later one goes.
  void keep(uint64_t cost, size_t* kept) {
    size_t slot = *kept;
    if (*kept == budget_.elites) {
      slot = 0;
      for (size_t k = 1; k < budget_.elites; ++k) {
        slot = costs_[k] >= costs_[slot] ? k : slot;
      }
      if (cost >= costs_[slot]) {
        return;
      }
    } else {
      ++*kept;
    }
    costs_[slot] = cost;
    for (size_t i = 0; i < values_; ++i) {
      elites_[slot * values_ + i] = sample_[i];
    }
  }

  void refit() {
    const int32_t count = static_cast<int32_t>(budget_.elites);
    for (size_t i = 0; i < values_; ++i) {
      int32_t total = 0;
      for (size_t k = 0; k < budget_.elites; ++k) {
        total += elites_[k * values_ + i];
      }
      mean_[i] = static_cast<int16_t>(average(total, count));
      uint64_t squares = 0;
      for (size_t k = 0; k < budget_.elites; ++k) {
        const int64_t off = elites_[k * values_ + i] - mean_[i];
        squares += static_cast<uint64_t>(off * off);
      }
      const uint32_t found = root(squares / budget_.elites);
      deviation_[i] = static_cast<int16_t>(clamp(found, budget_.least, uint32_t{32767}));
    }
  }

  World& world_;
  const int16_t* goal_;
  const Budget& budget_;
  size_t values_;
  uint64_t* costs_;
  int16_t* saved_;
  int16_t* mean_;
  int16_t* deviation_;
  int16_t* sample_;
  int16_t* elites_;
  int16_t* low_;
  int16_t* high_;
};

}  // namespace tinyengine

#endif
