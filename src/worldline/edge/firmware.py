"""The C++ side of a bundle: sources that compile by themselves, and a run of them in QEMU, byte for byte."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from worldline.core.errors import WorldlineError
from worldline.core.files import write_bytes
from worldline.core.native import LANGUAGE, TINYENGINE
from worldline.edge import commands
from worldline.edge.build import BARE, BOARDS, regions
from worldline.edge.commands import Command
from worldline.edge.world import IntegerWorld, State

TARGETS = {"cortex-m4": "m4", "cortex-m7": "m7", "cortex-m33": "m33", "cortex-m55": "m55"}
_CMAKE = """# The world's firmware for {target}: cmake -S . -B build && cmake --build build
# Compiled here: {tried}.
cmake_minimum_required(VERSION 3.16)
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_CXX_COMPILER arm-none-eabi-g++)
project(world CXX)
add_executable(world.elf
  tinyengine/firmware/world.cpp tinyengine/firmware/cortex/startup.cpp world_program.cpp)
target_compile_definitions(world.elf PRIVATE TINYENGINE_LINKED TINYENGINE_ARENA={arena})
target_include_directories(world.elf PRIVATE . tinyengine tinyengine/firmware/cortex)
set(FLAGS {flags})
target_compile_options(world.elf PRIVATE ${{FLAGS}})
# memory.ld says where flash and RAM lie: here those of QEMU's {machine}; put your board's there
target_link_options(world.elf PRIVATE ${{FLAGS}} -L${{CMAKE_SOURCE_DIR}}
  -T${{CMAKE_SOURCE_DIR}}/tinyengine/firmware/cortex/link.ld)
"""
_README = """# {name} in integers

A world for microcontrollers: it encodes pictures row by row, imagines steps, draws them, plans, and says how far off it
is. {num_weights:,} weights; the arithmetic is whole numbers only, and every build gives the same bytes.

| | bytes |
|---|---|
| program (flash) | {program_bytes:,} |
| arena (RAM), everything | {arena_bytes:,} |
| of it encoder, decoder | {encoder_arena_bytes:,}, {decoder_arena_bytes:,} |

| | multiplications |
|---|---|
| a picture to its latent | {encode_macs:,} |
| a step | {step_macs:,} |
| drawing a latent | {decode_macs:,} |

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

## Build and run

`cmake -S . -B build && cmake --build build` makes `world.elf`, which takes commands and answers by semihosting
(`tinyengine/firmware/world.cpp`). `worldline export ... target={target} --qemu` builds it and runs it in QEMU.

{qemu}

On a board, such as an STM32F407G-DISC1 (an STM32F405's core, 1 MB of flash): put its regions into `memory.ld`
(FLASH 0x08000000 1M, RAM 0x20000000 128K), then `st-flash --format ihex write world.hex` or
`openocd -f board/stm32f4discovery.cfg -c "program build/world.elf verify reset exit"`. Not run on hardware by us.
"""


def write_firmware(
    out: Path, world: IntegerWorld, name: str, actions: tuple[str, ...], target: str, sizes: dict[str, Any],
    ran: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Copy TinyEngine's sources beside the program's table, with a CMakeLists.txt and a README.md for `target`."""
    shutil.copytree(TINYENGINE, out / "tinyengine")
    board = BOARDS[TARGETS.get(target, "m4")]
    target = target if target in TARGETS else "cortex-m4"
    flags = " ".join((*LANGUAGE, *BARE, f"-mcpu={board.core}", *board.flags))
    tried = "yes, and run in QEMU" if ran else "no"
    cmake = _CMAKE.format(target=target, flags=flags, machine=board.machine, arena=sizes["arena_bytes"], tried=tried)
    write_bytes(out / "CMakeLists.txt", cmake.encode())
    write_bytes(out / "memory.ld", regions(board).encode())
    rows, columns, channels = world.encoder.stages[0].size_in
    del rows
    readme = _README.format(
        name=name, num_weights=world.num_weights, **sizes, row_bytes=columns * channels, target=target,
        latent=len(world.predictor.change.weight), action=len(actions), actions=", ".join(actions), qemu=_told(ran),
    )  # fmt: skip
    write_bytes(out / "README.md", readme.encode())


def run_in_qemu(world: IntegerWorld, program: bytes, arena_bytes: int, table: Path, target: str) -> dict[str, Any]:
    """Build the firmware with its program in flash, run it, and hold every answer to the reference.

    Raises:
        WorldlineError: no compiler or QEMU, the program does not fit, or an answer differs.
    """
    board = BOARDS[TARGETS[target]]
    if len(program) > board.flash[1] - 32 * 1024:
        raise WorldlineError(
            f"the program has {len(program):,} bytes and {board.machine} {board.flash[1]:,} of flash; give bits=4, or "
            "train a smaller world with model.hidden="
        )
    rows, columns, channels = world.encoder.stages[0].size_in
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, rows, columns, channels), dtype=np.uint8)
    z = world.encode(frames)
    state = State(z[:1], np.zeros((1, world.hidden), np.int16))
    asked = [Command("picture", frames[0]), Command("begin", z[0])]
    want: list[Any] = [z[0], None]
    for _ in range(5):
        action = rng.integers(-4000, 4000, (1, len(world.actions.mean))).astype(np.int16)
        state = world.step(state, action)
        asked += [Command("step", action[0]), Command("region"), Command("drift", z[1])]
        want += [state.z[0], world.gauge.region(state.z), world.gauge.drift(state.z, z[1:])]
    asked.append(Command("decode"))
    want.append(world.decode(state.z)[0])
    with tempfile.TemporaryDirectory() as folder:
        image = commands.compile_world(board, Path(folder), arena_bytes, table=table)
        sizes = (len(world.predictor.change.weight), len(world.actions.mean), 2 * world.decoder.stages[-1].size[0])
        replies, stack = commands.run_world(board, image, program, sizes, asked)
        told = subprocess.run(["arm-none-eabi-size", str(image)], capture_output=True, text=True, check=True).stdout
    for i, (command, reply, wanted) in enumerate(zip(asked, replies, want, strict=True)):
        if reply.status != "ok" or (wanted is not None and (reply.values != wanted).any()):
            raise WorldlineError(f"{target}: answer {i} ({command.verb}) differs from the reference: {reply.status}")
    costs = {c.verb: round(r.ticks * board.instructions_per_tick) for c, r in zip(asked, replies, strict=True)}
    return {
        "machine": board.machine,
        "answers_equal": len(asked),
        "instructions": {verb: costs[verb] for verb in ("picture", "step", "decode", "region", "drift")},
        "stack_bytes": stack,
        "image_bytes": int(told.splitlines()[1].split()[0]),
    }


def _told(ran: dict[str, Any] | None) -> str:
    if ran is None:
        return "It was not run when this was written."
    costs = ", ".join(f"{verb} {count / 1e6:.2f}" for verb, count in ran["instructions"].items())
    return (
        f"When this was written it ran in QEMU's {ran['machine']}: {ran['answers_equal']} answers equal to the "
        f"reference's bytes,\n{ran['image_bytes']:,} bytes of flash, {ran['stack_bytes']:,} of stack; instructions in "
        f"million: {costs}."
    )
