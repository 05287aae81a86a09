"""The words of a bundle: its CMakeLists.txt and README.md."""

CMAKE = """# The world's firmware: cmake -S . -B build -DBOARD={first} && cmake --build build
cmake_minimum_required(VERSION 3.16)
set(BOARD {first} CACHE STRING "one of boards/: {boards}")
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_CXX_COMPILER arm-none-eabi-g++)
project(world CXX)
# memory.ld says where flash and RAM lie, board.cmake the processor, and where input and output are
include(${{CMAKE_SOURCE_DIR}}/boards/${{BOARD}}/board.cmake)
foreach(image ${{IMAGES}})
  set(TABLE watching)  # the world without its decoder
  if(image STREQUAL player)
    set(TABLE .)
  endif()
  add_executable(${{image}}.elf
    tinyengine/firmware/${{image}}.cpp tinyengine/firmware/startup.cpp ${{TABLE}}/world_program.cpp)
  target_compile_definitions(${{image}}.elf PRIVATE TINYENGINE_LINKED)
  target_include_directories(${{image}}.elf PRIVATE ${{TABLE}} tinyengine/firmware/${{FILES}})
  target_compile_options(${{image}}.elf PRIVATE ${{FLAGS}})
  target_link_options(${{image}}.elf PRIVATE ${{FLAGS}} -L${{CMAKE_SOURCE_DIR}}/boards/${{BOARD}}
    -T${{CMAKE_SOURCE_DIR}}/tinyengine/firmware/link.ld)
  add_custom_command(TARGET ${{image}}.elf POST_BUILD
    COMMAND arm-none-eabi-objcopy -O ihex ${{image}}.elf ${{image}}.hex)
endforeach()
"""
BOARD = """# {what}
set(FLAGS {flags})
set(FILES {files})
set(IMAGES {images})
"""
README = """# {name} in integers

A world for microcontrollers: it encodes pictures row by row, imagines steps, draws them, plans, and says how far off it
is. {num_weights:,} weights; the arithmetic is whole numbers only, and every build gives the same bytes.

| | bytes |
|---|---|
| program (flash) | {program_bytes:,} |
| the same without the decoder (`watching/`), for observer and planner | {watching_bytes:,} |
| arena (RAM), everything | {arena_bytes:,} |
| of it encoder, decoder | {encoder_arena_bytes:,}, {decoder_arena_bytes:,} |

| | multiplications |
|---|---|
| a picture to its latent | {encode_macs:,} |
| a step | {step_macs:,} |
| drawing a latent | {decode_macs:,} |

The encoder's plans, bytes of RAM and times the multiplications; this program takes rows, the others keep the picture:

{plans}

![What lies where in the arena, and when](arena.svg)

## What the integers cost

{quality}

## In your firmware

```cpp
#include "tinyengine/world.hpp"
#include "world_program.hpp"

alignas(16) static uint8_t arena[kWorldArenaBytes];
static tinyengine::World world;

world.init(reinterpret_cast<const uint8_t*>(world_program), kWorldProgramBytes, arena, sizeof arena);
for (each row) world.push_row(row);        // {row_bytes} bytes, as the camera's DMA delivers them
int16_t z[{latent}], action[{action}];
world.latent(z);
world.begin(z);                            // forget the past; observe(z) keeps it
const float native[{action}] = {{...}};          // {actions}
world.action(native, action);
world.step(action);                        // world.state() is the imagined latent
uint32_t off;
world.drift(world.state(), seen, &off);    // in 1/256 of the variance of real latents
```

Every call returns a `Status`; a wrong order is told, not undefined. Nothing is allocated, thrown or printed.

## Three images

| | takes | gives |
|---|---|---|
| `observer` | actions, and pictures row by row | each picture's latent, and how far off what was imagined is |
| `planner` | a budget, a goal's picture, then pictures | plans by the cross-entropy method, and the action to take |
| `player` | what happens in a session | a hash over every picture drawn and every state |

The beginning of each `tinyengine/firmware/*.cpp` says what its input and output are, byte by byte.
`cmake -S . -B build -DBOARD={first} && cmake --build build` makes those that a board has room
for, as `.elf` and `.hex`.

| board | input and output | memory | room for |
|---|---|---|---|
{boards}

{qemu}

## On a board

```
cmake -S . -B build -DBOARD=nucleo-f429zi && cmake --build build
st-flash --format ihex write build/observer.hex         # or:
openocd -f board/st_nucleo_f4.cfg -c "program build/observer.elf verify reset exit"
python3 tinyengine/firmware/stm32f4/serve /dev/ttyACM0 INPUT OUTPUT
```

{board_tried} *Not run on hardware.* An STM32F4DISCOVERY (STM32F407, 1 MB of flash) has the same line on the pins PD8
and PD9: put its 1M and 128K into `boards/nucleo-f429zi/memory.ld`, give OpenOCD `board/stm32f4discovery.cfg`, and
export with `bits=4` (observer and planner fit). A NUCLEO-F446RE's 512 KB of flash want a smaller world
(`model.hidden=`). The images leave the clock as it is after a reset, 16 MHz; a product sets its own up in
`board::open`.
"""
