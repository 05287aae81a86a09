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
from worldline.core.native import TINYENGINE
from worldline.edge import build, commands, firmware_text, images
from worldline.edge.build import BOARDS, Board
from worldline.edge.commands import Command
from worldline.edge.images import FILES, Event, Exchange, Name
from worldline.edge.planner import Budget
from worldline.edge.world import IntegerWorld

TARGETS = {
    "cortex-m4": ("stm32f405", "m4"),
    "cortex-m7": ("m7",),
    "cortex-m33": ("m33",),
    "cortex-m55": ("m55",),
}
"""The boards of QEMU that stand for each, the smallest first."""
LINE = "nucleo-f429zi"
WATCHING = "watching"
"""The folder of the table without the decoder, which observer and planner have in flash."""
_CODE = 32 * 1024
_BUDGET = Budget(samples=8, elites=2, iterations=2, horizon=3, seed=1, spread=4000, least=100)


def board_for(target: str, program_bytes: int) -> tuple[str, Board]:
    """Return the smallest of QEMU's boards for a target that a program fits into.

    Raises:
        WorldlineError: it fits into none.
    """
    for name in TARGETS[target]:
        board = BOARDS[name]
        room = board.flash[1] - _CODE if board.program is None else board.program[1]
        if program_bytes <= room:
            return name, board
    raise WorldlineError(
        f"the program has {program_bytes:,} bytes, {board.machine} room for {room:,}; give bits=4, or train a smaller "
        "world with model.hidden="
    )


def table_of(name: Name, table: Path) -> Path:
    """Return the folder of the table that an image has in flash."""
    return table if name == "player" else table / WATCHING


def write_firmware(
    out: Path, world: IntegerWorld, name: str, actions: tuple[str, ...], target: str, sizes: dict[str, Any],
    ran: dict[str, Any] | None, quality: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Copy TinyEngine's sources beside the program's tables, with a CMakeLists.txt and a README.md for `target`."""
    shutil.copytree(TINYENGINE, out / "tinyengine", ignore=shutil.ignore_patterns("__pycache__"))
    of_target = target if target in TARGETS else "cortex-m4"
    fit: dict[str, list[str]] = {}  # which images each board has room for
    for image in FILES:
        size = sizes["program_bytes" if image == "player" else "watching_bytes"]
        smallest = board_for(of_target, size)[0]
        for place in TARGETS[of_target][TARGETS[of_target].index(smallest) :]:
            fit.setdefault(place, []).append(image)
    if BOARDS[TARGETS[of_target][0]].core == BOARDS[LINE].core:
        fit[LINE] = list(FILES)
    for place, fitting in fit.items():
        board = BOARDS[place]
        what = f"QEMU's {board.machine}" if board.machine else "without a debugger: USART3"
        text = firmware_text.BOARD.format(
            what=what, flags=" ".join(build.flags(board)), files=build.files(board), images=" ".join(fitting)
        )
        (out / "boards" / place).mkdir(parents=True)
        write_bytes(out / "boards" / place / "board.cmake", text.encode())
        write_bytes(out / "boards" / place / "memory.ld", build.regions(board).encode())
    first = next(iter(fit))
    write_bytes(out / "CMakeLists.txt", firmware_text.CMAKE.format(first=first, boards=", ".join(fit)).encode())
    rows = "\n".join(f"| `{place}` | {_board_in_words(BOARDS[place])} | {', '.join(fit[place])} |" for place in fit)
    tried = "They were compiled when this was written, for that board." if ran and ran["line"] else ""
    taken = {**sizes, "plans": "\n".join(f"- {told}" for told in sizes["plans"])}
    readme = firmware_text.README.format(
        name=name, num_weights=world.num_weights, **taken, row_bytes=world.encoder.stages[0].size_in[1] * 3,
        latent=len(world.predictor.change.weight), action=len(actions), actions=", ".join(actions), first=first,
        boards=rows, qemu=_told(ran), board_tried=tried, quality=_costs_of(quality),
    )  # fmt: skip
    write_bytes(out / "README.md", readme.encode())


def _board_in_words(board: Board) -> str:
    given = "a serial line (USART3)" if board.line else f"semihosting; QEMU: `{board.machine}`"
    return f"{given} | {board.flash[1] // 1024:,} KB of flash, {board.ram[1] // 1024:,} KB of RAM"


def run_in_qemu(world: IntegerWorld, sizes: dict[str, Any], table: Path, target: str) -> dict[str, Any]:
    """Build the firmware with its program in flash, run it, and hold every byte it gives to the reference.

    `table` is the folder of `write_tables`; `sizes` has the bytes of its programs and arenas.

    Raises:
        WorldlineError: no compiler or QEMU, a program does not fit, or a byte differs.
    """
    found: dict[str, Any] = {"images": {}, "line": {}}
    with tempfile.TemporaryDirectory() as folder:
        for asked in exchanges(world):
            part = "program" if asked.name == "player" else "watching"
            _, board = board_for(target, sizes[f"{part}_bytes"])
            lies = table_of(asked.name, table)
            image = build.compile_image(asked.name, board, Path(folder), 0, table=lies)
            given, stack = images.exchange(board, image, asked.name, asked.given, b"")
            if given != asked.wanted:
                raise WorldlineError(f"{target}: what {asked.name} gave differs from the reference")
            flash, ram = build.image_bytes(image)
            found["images"][asked.name] = {
                "machine": board.machine, "flash_bytes": flash, "ram_bytes": ram, "stack_bytes": stack,
                "bytes_equal": len(given),
            }  # fmt: skip
            if board.core == BOARDS[LINE].core:
                image = build.compile_image(asked.name, BOARDS[LINE], Path(folder) / LINE, 0, table=lies)
                no_breakpoints(image)
                found["line"][asked.name] = build.image_bytes(image)[0]
        _, board = board_for(target, sizes["program_bytes"])
        found["instructions"] = _costs(world, board, Path(folder), table)
    return found


def exchanges(world: IntegerWorld, num_frames: int = 6) -> list[Exchange]:
    """Return a short run of each image, with the reference's answers."""
    rows, columns, channels = world.encoder.stages[0].size_in
    rng, a = np.random.default_rng(0), world.actions
    frames = rng.integers(0, 256, (num_frames, rows, columns, channels), dtype=np.uint8)
    native = rng.uniform(a.low, a.high, (num_frames, len(a.low))).astype(np.float32)
    context = 2
    events = [Event(b"begin", frames[:context], native[: context - 1])]
    events += [Event(b"step", None, native[t : t + 1]) for t in range(num_frames)]
    events.append(Event(b"anchor", frames[-1:]))
    return [
        images.observing(world, frames, native, context, 2),
        images.planning(world, frames[0], frames[1:3], _BUDGET),
        images.playing(world, bytes(images.CHAIN), events),
    ]


def no_breakpoints(image: Path) -> None:
    """Hold that an image for a board without a debugger asks for none.

    Raises:
        WorldlineError: it does, and would stop there.
    """
    code = subprocess.run(["arm-none-eabi-objdump", "-d", str(image)], capture_output=True, text=True, check=True)
    if "bkpt" in code.stdout:
        raise WorldlineError(f"{image} stops at a breakpoint, which a board without a debugger never leaves")


def _costs(world: IntegerWorld, board: Board, folder: Path, table: Path) -> dict[str, int]:
    """Return what each call costs in instructions."""
    rows, columns, channels = world.encoder.stages[0].size_in
    zero = np.zeros(len(world.predictor.change.weight), np.int16)
    asked = [
        Command("picture", np.zeros((rows, columns, channels), np.uint8)), Command("begin", zero),
        Command("step", np.zeros(len(world.actions.mean), np.int16)), Command("region"), Command("drift", zero),
        Command("decode"),
    ]  # fmt: skip
    image = build.compile_image("world", board, folder, 0, table=table)
    sizes = (len(zero), len(world.actions.mean), 2 * world.decoder.stages[-1].size[0])
    replies, _ = commands.run_world(board, image, b"", sizes, asked)
    costs = {c.verb: round(r.ticks * board.instructions_per_tick) for c, r in zip(asked, replies, strict=True)}
    return {verb: costs[verb] for verb in ("picture", "step", "decode", "region", "drift")}


def _costs_of(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return "Not measured when this was written."
    lines = [
        f"On held-out episodes: cosine of latents {quality['cosine_mean']:.4f} "
        f"(worst percent {quality['cosine_p1']:.4f});",
        f"error to truth after {quality['steps']} imagined steps {quality['error_ratio']:.2f} times the float world's.",
        "",
        "Each layer alone, all others the float world's:",
        "",
        "| part | layer | weights | off |",
        "|---|---|---|---|",
        *(f"| {r['part']} | {r['layer']} | {r['weights']:,} | {r['off']:.5f} |" for r in quality["layers"]),
        "",
        "*Off* is one minus the cosine of latents (encoder), the distance of rollouts at their end in variances of",
        "real latents (predictor), the mean difference of pictures in shades of 255 (decoder).",
    ]
    return "\n".join(lines)


def _told(ran: dict[str, Any] | None) -> str:
    if ran is None:
        return "It was not run when this was written."
    costs = ", ".join(f"{verb} {count / 1e6:.2f}" for verb, count in ran["instructions"].items())
    lines = [
        "When this was written each ran in QEMU, and all it gave was the reference's bytes;",
        f"instructions in million: {costs}.",
        "",
        "| | machine | flash | RAM without stack | stack | bytes compared |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {of['machine']} | {of['flash_bytes']:,} | {of['ram_bytes']:,} | {of['stack_bytes']:,} | "
        f"{of['bytes_equal']:,} |"
        for name, of in ran["images"].items()
    ]
    return "\n".join(lines)
