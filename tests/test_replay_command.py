"""`worldline replay FILE --verify`: 0 and equal, or not 0 and the first bad frame, or one clear line."""

import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from worldline.cli import main
from worldline.core.files import read_json, sha256_file, write_json
from worldline.data.simulators import make_simulator
from worldline.engine.recording import Kind
from worldline.engine.runtime import Engine
from worldline.engine.workloads.latent import LatentWorkload, make_starts, save_starts
from worldline.model.checkpoint import CARD, WEIGHTS, save_world
from worldline.model.world import World, WorldConfig

FRAMES = 21


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `world` and a session that was played on it."""
    folder = tmp_path_factory.mktemp("played")
    torch.manual_seed(0)
    config = WorldConfig(latent_dim=8, hidden=16, conv_width=8, decoder_width=8, context=2)
    save_world(folder / "world", World(config, make_simulator("two_room").spec).eval(), training={"note": "untrained"})
    save_starts(folder / "world", make_starts("two_room", config.context, count=2))
    with Engine(LatentWorkload.open(folder / "world"), record=folder / "session.wlr", snapshot_every=10) as engine:
        engine.reset(1)
        for action in np.random.default_rng(0).uniform(-1, 1, (FRAMES - 1, 2)).astype(np.float32):
            engine.step(action)
    return folder


@pytest.fixture
def here(played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(played, tmp_path / "here"))
    monkeypatch.chdir(copy)
    return copy


def records(data: bytes, kind: Kind) -> list[tuple[int, int]]:
    """Return where the records of a kind begin and end, by the documented format."""
    found, at = [], 8
    while at < len(data):
        code, length, _, _ = struct.unpack_from("<B3xIII", data, at)
        if code == kind:
            found.append((at, at + 16 + length + 4))
        at += 16 + length + 4
    return found


def forge(path: Path, kind: Kind, nth: int, change: Callable[[bytearray], None]) -> None:
    """Change a record's payload and make its checksum right again."""
    data = bytearray(path.read_bytes())
    start, end = records(data, kind)[nth]
    payload = data[start + 16 : end - 4]
    change(payload)
    data[start + 16 : end - 4] = payload
    data[end - 4 : end] = struct.pack("<I", zlib.crc32(payload, zlib.crc32(data[start : start + 12])))
    path.write_bytes(data)


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Return exit status, last line of output and error output."""
    status = main(["replay", "session.wlr", "checkpoint=world", "--verify", *words])
    shown = capsys.readouterr()
    return status, shown.out.strip().splitlines()[-1] if shown.out else "", shown.err


def test_a_session_verifies_in_a_fresh_process(here: Path) -> None:
    command = [sys.executable, "-m", "worldline", "replay", "session.wlr", "checkpoint=world", "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    assert f"\n{FRAMES} frames, equal to the bit" in done.stdout


def set_value(payload: bytearray, at: int, value: float) -> None:
    struct.pack_into("<f", payload, at, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: set_value(payload, 72, 0.123),  # the action
        lambda payload: payload.__setitem__(8, payload[8] ^ 1),  # the frame's hash
        lambda payload: payload.__setitem__(24, payload[24] ^ 1),  # the chain's hash
    ],
)
def test_a_changed_frame_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], change: Callable[[bytearray], None]
) -> None:
    forge(here / "session.wlr", Kind.STEP, 12, change)  # which made frame 13
    status, line, _ = verify(capsys)
    assert status == 1
    assert line.startswith("differs at frame 13: ")


def test_a_changed_weight_names_the_first_bad_frame(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a card that fits the changed weights would let through."""
    weights = here / "world" / WEIGHTS
    tensors = load_file(weights)
    tensors["decoder.linear.bias"][0] += 1e-2
    save_file(tensors, weights)
    card = read_json(here / "world" / CARD)
    card["weights"]["sha256"] = sha256_file(weights)
    write_json(here / "world" / CARD, card)
    status, line, _ = verify(capsys)
    assert status == 1
    assert line.startswith("differs at frame 0: ")
    assert "other weights" in line


def one_line(error: str) -> str:
    assert error.startswith("worldline: ")
    assert error.count("\n") == 1
    return error


def test_a_flipped_weight_byte_names_frame_0_and_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = here / "world" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    status, _, error = verify(capsys)
    assert status == 2
    assert "not verified from frame 0 on: " in one_line(error)
    assert f"{WEIGHTS} is not the file its card describes" in error


def test_a_torn_tail_is_verified_as_far_as_it_goes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "session.wlr"
    data = path.read_bytes()
    path.write_bytes(data[: records(data, Kind.STEP)[14][1] - 3])  # in the middle of frame 15
    status, line, _ = verify(capsys)
    assert status == 0
    assert line.startswith("15 frames, equal to the bit (incomplete, 15 frames)")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], "damaged at frame"),
        (lambda data: b"PK\x03\x04" + data, "not a replay file"),
        (lambda data: b"", "not a replay file"),
        (lambda data: data[:7] + b"\x09" + data[8:], "version 9 of the replay format"),
        (lambda data: data[:40], "ends within its header"),
        (lambda data: data[: records(data, Kind.RESET)[0][0]], "holds no frame"),
    ],
)
def test_other_damage_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], told: str
) -> None:
    path = here / "session.wlr"
    path.write_bytes(damage(path.read_bytes()))
    status, _, error = verify(capsys)
    assert status == 2
    assert told in one_line(error)


def test_another_kind_of_world_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = verify(capsys, "checkpoint=pusht")
    assert status == 2
    assert "recorded with another kind of world" in one_line(error)


def test_heavy_moves_the_state_every_frame(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line, _ = verify(capsys, "--heavy")
    assert status == 0
    assert line.startswith(f"{FRAMES} frames, equal to the bit")


def test_bisect_names_stage_and_tensor(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "session.wlr", "checkpoint=world", "--bisect"]) == 0
    assert capsys.readouterr().out.strip().endswith("so in 5 of 5 verifications")
    forge(here / "session.wlr", Kind.STEP, 12, lambda payload: set_value(payload, 72, 0.123))
    assert main(["replay", "session.wlr", "checkpoint=world", "--bisect"]) == 1
    first, second = capsys.readouterr().out.strip().splitlines()[-2:]
    assert first.startswith("differs at frame 13: step wrote another z")
    assert second.endswith("the same other bits each time, so the arithmetic is another, and not chance")
