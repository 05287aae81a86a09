"""Compile TinyEngine: for this machine, and for Cortex-M boards that QEMU has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from worldline.core import native
from worldline.core.errors import WorldlineError
from worldline.core.native import LANGUAGE, TINYENGINE

BARE = (
    "-O2", "-mthumb", "-ffreestanding", "-fno-threadsafe-statics", "-ffunction-sections", "-fdata-sections",
    "-nostartfiles", "-Wl,--gc-sections", "--specs=nano.specs", "--specs=nosys.specs",
)  # fmt: skip
PACKAGES = "gcc-arm-none-eabi libnewlib-arm-none-eabi libstdc++-arm-none-eabi-newlib qemu-system-arm"


@dataclass(frozen=True)
class Board:
    """A processor, where its memory lies, and the QEMU machine that stands in for it."""

    core: str
    flags: tuple[str, ...]
    machine: str
    """Empty where QEMU has none."""
    flash: tuple[int, int]
    """Origin and bytes."""
    ram: tuple[int, int]
    instructions_per_tick: float = 0.0
    """Of SysTick, under `-icount shift=0`."""
    program: tuple[int, int] | None = None
    """Where a world's program lies, origin and bytes; None: in flash."""
    line: bool = False
    """Whether input and output go over a serial line: there is no debugger to have files."""


_K, _M = 1024, 1024 * 1024
BOARDS = {
    "m4": Board(
        "cortex-m4", ("-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), "mps2-an386", (0, 4 * _M), (0x20000000, 4 * _M), 40.0
    ),
    "m7": Board(
        "cortex-m7", ("-mfloat-abi=hard", "-mfpu=fpv5-sp-d16"), "mps2-an500", (0, 4 * _M), (0x20000000, 4 * _M), 40.0
    ),
    "m33": Board(
        "cortex-m33", ("-mfloat-abi=hard", "-mfpu=fpv5-sp-d16"), "mps2-an505", (0x10000000, 4 * _M),
        (0x38000000, 4 * _M), 50.0,
    ),
    "m55": Board(
        "cortex-m55", ("-mfloat-abi=hard",), "mps3-an547", (0, 512 * _K), (0x20000000, 512 * _K), 31.25,
        program=(0x60000000, 16 * _M),
    ),
    "stm32f405": Board(
        "cortex-m4", ("-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), "netduinoplus2", (0x08000000, _M),
        (0x20000000, 128 * _K), 5.952,
    ),
    "nucleo-f429zi": Board(
        "cortex-m4", ("-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), "", (0x08000000, 2 * _M), (0x20000000, 192 * _K),
        line=True,
    ),
}  # fmt: skip


def compile_host(sources: Sequence[Path], image: Path, options: Sequence[str] = ()) -> None:
    """Compile an image for this machine; its files are this machine's.

    Raises:
        WorldlineError: there is no C++ compiler, or it refused.
    """
    native.compile_host(sources, image, ["-I", str(TINYENGINE / "firmware/host"), *options])


def regions(board: Board) -> str:
    """Return the linker's view of a board's memory."""
    parts = {"FLASH (rx)": board.flash, "RAM (rwx)": board.ram}
    if board.program is not None:
        parts["PROGRAM (r)"] = board.program
    lines = (f"  {name} : ORIGIN = {origin:#x}, LENGTH = {size:#x}\n" for name, (origin, size) in parts.items())
    alias = 'REGION_ALIAS("PROGRAM", FLASH)\n' if board.program is None else ""
    return f"MEMORY\n{{\n{''.join(lines)}}}\n{alias}"


def compile_board(board: Board, sources: Sequence[Path], image: Path, options: Sequence[str] = ()) -> None:
    """Compile a bare-metal image; the memory's layout is written beside it.

    Raises:
        WorldlineError: there is no compiler for Arm, or it refused.
    """
    compiler = shutil.which("arm-none-eabi-g++")
    if compiler is None:
        raise WorldlineError(f"no compiler for Arm here; on Debian: apt-get install --no-install-recommends {PACKAGES}")
    image.parent.mkdir(parents=True, exist_ok=True)
    (image.parent / "memory.ld").write_text(regions(board))
    firmware = TINYENGINE / "firmware"
    native.run(
        [
            compiler, *flags(board), "-I", str(firmware / files(board)), *options, "-L", str(image.parent),
            "-T", str(firmware / "link.ld"), str(firmware / "startup.cpp"), *map(str, sources), "-o", str(image),
        ]
    )  # fmt: skip


def flags(board: Board) -> tuple[str, ...]:
    """Return what a board's images are compiled and linked with."""
    return (*LANGUAGE, *BARE, f"-mcpu={board.core}", *board.flags)


def files(board: Board) -> str:
    """Return the folder of firmware/ that knows where a board's input and output are."""
    return "stm32f4" if board.line else "semihosting"


def compile_image(
    name: Literal["world", "observer", "planner", "player"],
    target: Board | None,
    folder: Path,
    arena_bytes: int,
    options: Sequence[str] = (),
    table: Path | None = None,
) -> Path:
    """Compile an image of firmware/ for a board, or (None) for this machine.

    With `table`, a folder with `world_program.cpp`, a board has that program in flash, and the arena is the one it
    wants; else it is read from a file.
    """
    image, source = folder / f"{name}.elf", TINYENGINE / f"firmware/{name}.cpp"
    options = (*options, *([] if table is not None else [f"-DTINYENGINE_ARENA={arena_bytes}"]))
    folder.mkdir(parents=True, exist_ok=True)
    if target is None:
        compile_host([source], image, options)
    elif table is not None:
        sources = [source, table / "world_program.cpp"]
        compile_board(target, sources, image, ["-DTINYENGINE_LINKED", "-I", str(table), *options])
    else:
        elsewhere = () if target.program is None else (f"-DTINYENGINE_PROGRAM_AT={target.program[0]:#x}",)
        compile_board(target, [source], image, [*elsewhere, *options])
    return image


def run_image(target: Board | None, image: Path, timeout_s: float = 300.0) -> None:
    """Run an image of `compile_image`, its files in its folder.

    Raises:
        WorldlineError: it did not end in time, or ended with an error.
    """
    if target is None:
        native.run([str(image)], cwd=image.parent, timeout_s=timeout_s)
    else:
        run_board(target, image, timeout_s)


def image_bytes(image: Path) -> tuple[int, int]:
    """Return the bytes that an image takes in flash, a linked program among them, and in RAM, without the stack."""
    told = subprocess.run(["arm-none-eabi-size", "-A", str(image)], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in told.splitlines())
    sizes = {row[0]: int(row[1]) for row in rows if len(row) == 3 and row[0].startswith(".")}
    flash, ram = (
        sum(sizes.get(section, 0) for section in sections)
        for sections in ((".text", ".program", ".rodata", ".ARM.exidx", ".data"), (".data", ".bss"))
    )
    return flash, ram


def run_board(board: Board, image: Path, timeout_s: float = 300.0) -> None:
    """Run an image in QEMU, its files in the image's folder; instructions are counted, and so are the same each time.

    Raises:
        WorldlineError: QEMU is missing, the image did not end in time, or it ended with an error.
    """
    command = [
        *qemu(board, image), "-serial", "null",
        "-semihosting-config", "enable=on,target=native", "-icount", "shift=0",
    ]  # fmt: skip
    native.run(command, cwd=image.parent, timeout_s=timeout_s)


def qemu(board: Board, image: Path) -> list[str]:
    """Return the beginning of a command that runs an image.

    Raises:
        WorldlineError: QEMU is missing.
    """
    if shutil.which("qemu-system-arm") is None:
        raise WorldlineError(f"no QEMU here; on Debian: apt-get install --no-install-recommends {PACKAGES}")
    return ["qemu-system-arm", "-M", board.machine, "-nographic", "-monitor", "none", "-kernel", str(image)]
