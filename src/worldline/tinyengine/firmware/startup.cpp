// From reset to main, for any Cortex-M: no library is behind it.
#include "board.hpp"

extern "C" {
extern uint32_t link_data_from, link_data_begin, link_data_end, link_bss_begin, link_bss_end, link_stack_low,
    link_stack_high;
int main();
[[noreturn]] void reset_handler();
}

namespace {

constexpr uint32_t kPaint = 0xa5a5a5a5;
volatile uint32_t wraps = 0;

uint32_t& peripheral(uintptr_t at) { return *reinterpret_cast<uint32_t*>(at); }

volatile uint32_t& io(uintptr_t at) { return *static_cast<volatile uint32_t*>(&peripheral(at)); }

constexpr uintptr_t kCpacr = 0xe000ed88, kSystickControl = 0xe000e010, kSystickReload = 0xe000e014,
                    kSystickValue = 0xe000e018, kInterruptControl = 0xe000ed04;

extern "C" void fault_handler() {
  board::print("tinyengine: the processor faulted\n");
  board::leave(70);
}

extern "C" void tick_handler() { wraps = wraps + 1; }

}  // namespace

extern "C" __attribute__((section(".vectors"), used)) const uintptr_t vectors[16] = {
    reinterpret_cast<uintptr_t>(&link_stack_high),
    reinterpret_cast<uintptr_t>(&reset_handler),
    reinterpret_cast<uintptr_t>(&fault_handler),
    reinterpret_cast<uintptr_t>(&fault_handler),
    reinterpret_cast<uintptr_t>(&fault_handler),
    reinterpret_cast<uintptr_t>(&fault_handler),
    reinterpret_cast<uintptr_t>(&fault_handler),
    reinterpret_cast<uintptr_t>(&fault_handler),
    0,
    0,
    0,
    reinterpret_cast<uintptr_t>(&fault_handler),
    reinterpret_cast<uintptr_t>(&fault_handler),
    0,
    reinterpret_cast<uintptr_t>(&fault_handler),
    reinterpret_cast<uintptr_t>(&tick_handler),
};

extern "C" __attribute__((optimize("no-tree-loop-distribute-patterns"))) void reset_handler() {
  io(kCpacr) = io(kCpacr) | (0xfu << 20);  // floating point and vectors
  asm volatile("dsb\n isb");
  const uint32_t* from = &link_data_from;
  for (uint32_t* to = &link_data_begin; to < &link_data_end; ++to) {
    *to = *from++;
  }
  for (uint32_t* to = &link_bss_begin; to < &link_bss_end; ++to) {
    *to = 0;
  }
  uint32_t here;
  for (uint32_t* to = &link_stack_low; to < &here; ++to) {
    *to = kPaint;
  }
  board::open();
  board::leave(main());
}

namespace board {

void start_clock() {
  io(kSystickReload) = 0xffffff;
  io(kSystickValue) = 0;
  wraps = 0;
  io(kSystickControl) = 7;  // on, with interrupt, from the processor's clock
}

uint64_t ticks() {
  for (;;) {
    const uint32_t before = wraps;
    const uint32_t value = io(kSystickValue) & 0xffffff;
    const bool pending = (io(kInterruptControl) & (1u << 26)) != 0;
    if (before == wraps && !pending) {
      return (static_cast<uint64_t>(before) << 24) + (0xffffff - value);
    }
  }
}

size_t stack_used() {
  const uint32_t* at = &link_stack_low;
  while (at < &link_stack_high && *at == kPaint) {
    ++at;
  }
  return static_cast<size_t>(&link_stack_high - at) * 4;
}

}  // namespace board
