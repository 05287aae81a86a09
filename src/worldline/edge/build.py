"""Compile TinyEngine: for this machine, and for Cortex-M boards that QEMU has."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    flash: tuple[int, int]
    """Origin and bytes."""
    ram: tuple[int, int]
    instructions_per_tick: float
    """Of SysTick, under `-icount shift=0`."""


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
    "m55": Board("cortex-m55", ("-mfloat-abi=hard",), "mps3-an547", (0, 512 * _K), (0x20000000, 512 * _K), 31.25),
    "stm32f405": Board(
        "cortex-m4", ("-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), "netduinoplus2", (0x08000000, _M),
        (0x20000000, 128 * _K), 5.952,
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
    lines = (
        f"  {name} : ORIGIN = {origin:#x}, LENGTH = {size:#x}\n"
        for name, (origin, size) in (("FLASH (rx)", board.flash), ("RAM (rwx)", board.ram))
    )
    return f"MEMORY\n{{\n{''.join(lines)}}}\n"


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
    cortex = TINYENGINE / "firmware/cortex"
    native.run(
        [
            compiler, *LANGUAGE, *BARE, f"-mcpu={board.core}", *board.flags, "-I", str(cortex), *options,
            "-L", str(image.parent), "-T", str(cortex / "link.ld"), str(cortex / "startup.cpp"), *map(str, sources),
            "-o", str(image),
        ]
    )  # fmt: skip


def run_board(board: Board, image: Path, timeout_s: float = 300.0) -> None:
    """Run an image in QEMU, its files in the image's folder; instructions are counted, and so are the same each time.

    Raises:
        WorldlineError: QEMU is missing, the image did not end in time, or it ended with an error.
    """
    if shutil.which("qemu-system-arm") is None:
        raise WorldlineError(f"no QEMU here; on Debian: apt-get install --no-install-recommends {PACKAGES}")
    command = [
        "qemu-system-arm", "-M", board.machine, "-nographic", "-monitor", "none", "-serial", "null",
        "-semihosting-config", "enable=on,target=native", "-icount", "shift=0", "-kernel", str(image),
    ]  # fmt: skip
    native.run(command, cwd=image.parent, timeout_s=timeout_s)


def run_host(image: Path, timeout_s: float = 300.0) -> None:
    """Run an image of this machine, its files in the image's folder.

    Raises:
        WorldlineError: it did not end in time, or ended with an error.
    """
    native.run([str(image)], cwd=image.parent, timeout_s=timeout_s)
