"""The firmware's images: all that observer, planner and player give is the reference's bytes, whoever feeds them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from little_world import little_bundle, little_worlds

from worldline.core.files import read_json
from worldline.core.native import TINYENGINE
from worldline.edge import build, firmware, images
from worldline.edge.build import BOARDS
from worldline.edge.emit import write_bundle, write_tables
from worldline.edge.program import write_world
from worldline.model.int8 import MANIFEST

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ (apt-get install g++)")
HEAP = re.compile(r"\b(_?malloc|_?free|_?sbrk|_?calloc|_?realloc|_Zn[wa]\w*|__cxa_\w+)\b")


@needs_compiler
@pytest.mark.parametrize("name", ["observer", "planner", "player"])
def test_images_give_the_references_bytes(worlds, tmp_path, name):
    _, whole = worlds
    program, arena = write_world(whole)
    (asked,) = (e for e in firmware.exchanges(whole) if e.name == name)
    image = build.compile_image(asked.name, None, tmp_path, arena, ["-O1"])
    given, _ = images.exchange(None, image, asked.name, asked.given, program)
    assert given == asked.wanted
    (other,) = (e for e in firmware.exchanges(replace(whole, scale=1.0, encoder=_changed(whole))) if e.name == name)
    assert other.wanted != asked.wanted


def _changed(whole):
    end = whole.encoder.end
    return replace(whole.encoder, end=replace(end, matrix=replace(end.matrix, bias=end.matrix.bias + 5000)))


def tables(whole, folder: Path) -> dict[str, int]:
    return {"program_bytes": len(write_world(whole)[0]), "watching_bytes": len(write_tables(folder, whole))}


@pytest.mark.cortex
def test_images_give_the_references_bytes_in_qemu(tmp_path):
    """On a board whose flash is too small for a program, which lies beside it."""
    _, whole = little_worlds("none", 8)
    found = firmware.run_in_qemu(whole, tables(whole, tmp_path), tmp_path, "cortex-m55")
    assert {name: of["bytes_equal"] for name, of in found["images"].items()} == {
        e.name: len(e.wanted) for e in firmware.exchanges(whole)
    }


@pytest.mark.cortex
def test_a_bundle_compiles_by_itself_and_was_tried(tmp_path):
    """With nothing of the package but what lies in the bundle; no image has a heap."""
    world, whole = little_worlds("none", 8)
    checkpoint = little_bundle(world, whole, tmp_path) / "checkpoint"
    tried = write_bundle(tmp_path / "tried", checkpoint, whole, {}, target="cortex-m4", qemu=True)
    ran, readme = read_json(tried / MANIFEST)["qemu"], (tried / "README.md").read_text()
    assert {of["machine"] for of in ran["images"].values()} == {"netduinoplus2"}
    assert set(ran["line"]) == set(ran["images"]) == {"observer", "planner", "player"}
    for name, of in ran["images"].items():
        assert f"| {name} | netduinoplus2 | {of['flash_bytes']:,} | {of['ram_bytes']:,} |" in readme
    for board in ("stm32f405", firmware.LINE):
        settings = (tried / "boards" / board / "board.cmake").read_text()
        flags = re.search(r"set\(FLAGS (.*)\)", settings).group(1).split()
        files = "tinyengine/firmware/" + re.search(r"set\(FILES (.*)\)", settings).group(1)
        image = tmp_path / f"{board}.elf"
        sources = ["tinyengine/firmware/planner.cpp", "tinyengine/firmware/startup.cpp", "watching/world_program.cpp"]
        command = [
            "arm-none-eabi-g++",
            *flags,
            "-DTINYENGINE_LINKED",
            "-Iwatching",
            "-I",
            files,
            "-L",
            f"boards/{board}",
        ]
        command += ["-Ttinyengine/firmware/link.ld", *sources, "-o", str(image)]
        subprocess.run(command, cwd=tried, check=True)
        symbols = subprocess.run(["arm-none-eabi-nm", str(image)], capture_output=True, text=True, check=True).stdout
        assert "reset_handler" in symbols
        assert not HEAP.search(symbols)


@pytest.mark.cortex
def test_an_image_is_served_over_a_serial_line(tmp_path):
    """The registers of an STM32F4's USART3, as QEMU has them, and the script that a bundle brings."""
    _, whole = little_worlds("none", 8)
    tables(whole, tmp_path)
    board, asked = replace(BOARDS["stm32f405"], line=True), firmware.exchanges(whole, 3)[0]
    image = build.compile_image(asked.name, board, tmp_path, 0, table=firmware.table_of(asked.name, tmp_path))
    firmware.no_breakpoints(image)
    (tmp_path / "in").write_bytes(struct.pack("<I", 0) + asked.given)
    command = [*build.qemu(board, image), "-serial", "null", "-serial", "null", "-serial", "pty"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as qemu:
        try:
            line = re.search(r"/dev/\S+", qemu.stdout.readline()).group()
            serve = [sys.executable, str(TINYENGINE / "firmware/stm32f4/serve"), line]
            subprocess.run([*serve, str(tmp_path / "in"), str(tmp_path / "out")], check=True, timeout=300)
        finally:
            qemu.kill()
    assert Path(tmp_path / "out").read_bytes() == asked.wanted
