"""The replay file: torn tails, damage, forgeries, snapshots."""

import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from engine_world import SmallWorld, actions
from hypothesis import given, settings
from hypothesis import strategies as st

from worldline.core.errors import WorldlineError
from worldline.engine.recording import Kind, Recording
from worldline.engine.replay import seek, verify
from worldline.engine.runtime import Engine

REAL = np.random.default_rng(5).integers(0, 255, (8, 8, 3)).astype(np.uint8)


def record(path: Path, snapshot_every: int = 8) -> tuple[bytes, list[bytes]]:
    """Record 32 frames, with two resets and an anchor, and return the last chain hash and all of them."""
    chains = []
    with Engine(SmallWorld(), record=path, snapshot_every=snapshot_every) as engine:
        chains.append(engine.reset(7, "héllo").chain)
        chains += [engine.step(action).chain for action in actions(10)]
        chains.append(engine.anchor(REAL).chain)
        chains += [engine.step(action).chain for action in actions(9, 1)]
        chains.append(engine.reset(3).chain)
        chains += [engine.step(action).chain for action in actions(10, 2)]
    return chains[-1], chains


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wlr") / "session.wlr"
    record(path)
    return path


def records_of(data: bytes) -> list[tuple[int, int, int]]:
    """Return (kind, start, end) of every record, walking the documented format independently of the reader."""
    found, offset = [], 8
    while offset < len(data):
        kind, length, _, _ = struct.unpack_from("<B3xIII", data, offset)
        found.append((kind, offset, offset + 16 + length + 4))
        offset = found[-1][2]
    return found


def forge(data: bytes, nth: int, change) -> bytes:
    """Change the payload of record `nth` and make its checksum right again."""
    _, start, end = records_of(data)[nth]
    payload = bytearray(data[start + 16 : end - 4])
    payload = change(payload) or payload
    head = data[start : start + 12]
    head = head[:4] + struct.pack("<I", len(payload)) + head[8:]
    record = head + struct.pack("<I", zlib.crc32(head)) + bytes(payload)
    return data[:start] + record + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + data[end:]


def flip(at: int):
    def change(payload: bytearray) -> None:
        payload[at] ^= 1

    return change


def test_the_layout_is_as_documented(recorded: Path) -> None:
    kinds = [kind for kind, _, _ in records_of(recorded.read_bytes())]
    pictures = "R" + "S" * 10 + "A" + "S" * 9 + "R" + "S" * 10
    expected = [Kind.HEADER]
    for index, letter in enumerate(pictures, start=1):
        expected.append({"R": Kind.RESET, "S": Kind.STEP, "A": Kind.ANCHOR}[letter])
        if index % 8 == 0:
            expected.append(Kind.SNAPSHOT)
    assert kinds == [*expected, Kind.END]


def test_replays_equal_in_a_fresh_process(recorded: Path) -> None:
    code = (
        "import sys; from engine_world import SmallWorld; from worldline.engine.replay import verify;"
        f"verdict = verify({str(recorded)!r}, SmallWorld()); print(verdict); sys.exit(not verdict.ok)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "32 frames, equal to the bit"), done.stderr


def test_a_torn_tail_is_recovered_at_every_byte(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    records = records_of(data)
    path = tmp_path / "torn.wlr"
    for cut in range(records[-7][1], len(data)):
        path.write_bytes(data[:cut])
        whole = [kind for kind, _, end in records if end <= cut]
        recording = Recording(path)
        assert not recording.complete
        assert recording.frames == sum(kind in (Kind.RESET, Kind.STEP, Kind.ANCHOR) for kind in whole), cut
    path.write_bytes(data[: records[-3][2] + 5])
    verdict = verify(path, SmallWorld())
    assert verdict.ok
    assert not verdict.complete
    assert str(verdict) == f"{verdict.frames} frames, equal to the bit (incomplete, {verdict.frames} frames)"


def test_a_tail_that_the_disk_never_got_is_recovered(recorded: Path, tmp_path: Path) -> None:
    """After a power cut a file may have its length, but zeros in place of what was not written."""
    data = recorded.read_bytes()
    records = records_of(data)
    path = tmp_path / "zeros.wlr"
    for cut in range(records[-4][1], len(data) - 1):
        path.write_bytes(data[:cut] + bytes(len(data) - cut))
        assert not Recording(path).complete, cut


def test_a_file_torn_before_its_first_frame(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    path = tmp_path / "early.wlr"
    for cut in range(8, records_of(data)[0][2]):
        path.write_bytes(data[:cut])
        with pytest.raises(WorldlineError, match="ends within its header"):
            Recording(path)


def test_any_flipped_bit_is_damage(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    path = tmp_path / "flipped.wlr"
    for at in [*range(0, len(data), 7), *range(len(data) - 300, len(data))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(WorldlineError):
            Recording(path)


def test_damage_names_the_first_bad_frame(recorded: Path, tmp_path: Path) -> None:
    data = bytearray(recorded.read_bytes())
    steps = [item for item in records_of(data) if item[0] == Kind.STEP]
    data[steps[4][2] - 6] ^= 1  # the last action byte but one of frame 5
    path = tmp_path / "action.wlr"
    path.write_bytes(data)
    with pytest.raises(WorldlineError, match=r"damaged at frame 5: checksum"):
        verify(path, SmallWorld())


def test_a_removed_record_is_damage(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    _, start, end = records_of(data)[4]
    path = tmp_path / "removed.wlr"
    path.write_bytes(data[:start] + data[end:])
    with pytest.raises(WorldlineError, match="damaged at frame 3: record 4 expected"):
        Recording(path)


@pytest.mark.parametrize(
    ("nth", "at", "frame", "reason"),
    [
        (6, -3, 5, "step wrote another z"),  # an action
        (6, 8, 5, "decode wrote another frame"),  # the hash of a picture
        (6, 24, 5, "what led to it is not"),  # a chain hash
        (6, 40, 5, "step wrote another z"),  # the hash of a state tensor
        (6, 56, 5, "step wrote another memory"),  # of the other one
        (1, 72, 0, "reset wrote another z"),  # the seed of the reset
        (1, -1, 0, "reset wrote another z"),  # its prompt
        (13, 92, 11, "anchor wrote another z"),  # the real frame of the anchor
        (9, 24, 7, "holds another z"),  # a snapshot's state
        (9, 9, 7, "another chain hash"),  # a snapshot's chain
        (-1, 9, 31, "the end record after it"),  # the end's chain
    ],
)
def test_a_forgery_with_right_checksums_is_caught(
    recorded: Path, tmp_path: Path, nth: int, at: int, frame: int, reason: str
) -> None:
    path = tmp_path / "forged.wlr"
    path.write_bytes(forge(recorded.read_bytes(), nth, flip(at)))
    verdict = verify(path, SmallWorld())
    assert not verdict.ok
    assert verdict.first_bad_frame == frame
    assert reason in str(verdict)


def test_other_weights_fail_and_are_named(recorded: Path) -> None:
    world = SmallWorld()
    world.recur.view(-1)[3] += 1e-3
    verdict = verify(recorded, world)
    assert not verdict.ok
    assert verdict.first_bad_frame == 1  # the reset does not use these weights
    assert "other weights" in str(verdict)


def test_weights_that_change_no_frame_fail_all_the_same(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "forged.wlr"
    weights = SmallWorld().fingerprint()["weights"].encode()
    path.write_bytes(forge(recorded.read_bytes(), 0, lambda payload: payload.replace(weights, b"f" * len(weights))))
    verdict = verify(path, SmallWorld())
    assert (verdict.ok, verdict.first_bad_frame) == (False, 0)
    assert "other weights" in verdict.reason


def test_another_machine_is_only_noted(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "machine.wlr"
    path.write_bytes(
        forge(recorded.read_bytes(), 0, lambda payload: payload.replace(b'"threads": "1"', b'"threads": "2"'))
    )
    verdict = verify(path, SmallWorld())
    assert verdict.ok
    assert verdict.differs == {"threads": ("2", "1")}


def test_equal_weights_in_another_place_are_the_same_world(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.wlr"
    path.write_bytes(
        forge(
            recorded.read_bytes(), 0, lambda p: p.replace(b'"threads": "1"', b'"threads": "2", "checkpoint": "runs/a"')
        )
    )
    assert str(verify(path, SmallWorld())) == (
        "32 frames, equal to the bit; though not with the same threads; the same weights, recorded as 'runs/a', opened "
        "as ''"
    )


def test_a_recording_of_no_frames_is_not_equal(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    path = tmp_path / "empty.wlr"
    path.write_bytes(data[: records_of(data)[0][2]])
    with pytest.raises(WorldlineError, match="holds no frame"):
        verify(path, SmallWorld())


def test_another_world_is_one_clear_error(recorded: Path) -> None:
    with pytest.raises(WorldlineError, match="another kind of world"):
        verify(recorded, SmallWorld(width=16))


@pytest.mark.parametrize("content", [b"", b"\x89WL", b"PK\x03\x04" + bytes(100), b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.wlr"
    path.write_bytes(content)
    with pytest.raises(WorldlineError, match="not a replay file"):
        Recording(path)


def test_missing_file_and_newer_version(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match=r"cannot be read .*; give the path of a \.wlr file"):
        Recording(tmp_path / "none.wlr")
    path = tmp_path / "newer.wlr"
    data = recorded.read_bytes()
    path.write_bytes(data[:7] + b"\x03" + data[8:])
    with pytest.raises(WorldlineError, match="version 3 of the replay format, this worldline reads 2"):
        Recording(path)


@pytest.mark.parametrize("kind", [*range(7), 255])
def test_a_flood_of_length_is_refused_before_it_is_read(recorded: Path, tmp_path: Path, kind: int) -> None:
    data = recorded.read_bytes()
    start = records_of(data)[5][1]
    head = struct.pack("<B3xII", kind, 0xFFFFFFF0, 5)
    path = tmp_path / "flood.wlr"
    path.write_bytes(data[:start] + head + struct.pack("<I", zlib.crc32(head)) + data[start + 16 :])
    with pytest.raises(WorldlineError, match="damaged at frame 4"):
        Recording(path)


@pytest.mark.parametrize(
    "header",
    [b"{}", b"[]", b"\xff\xff", b'{"fingerprint": 3}', b'{"frame_shape": [1e9, 1, 3]}', b"[" * 5000],
)
def test_a_header_of_nonsense_is_refused(recorded: Path, tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "header.wlr"
    path.write_bytes(forge(recorded.read_bytes(), 0, lambda _: header))
    with pytest.raises(WorldlineError, match="header"):
        Recording(path)


@settings(max_examples=20, deadline=None)
@given(frame=st.integers(0, 31), more=st.integers(1, 12))
def test_going_on_from_a_snapshot_equals_the_straight_run(recorded: Path, frame: int, more: int) -> None:
    straight = Engine(SmallWorld())
    for item in Recording(recorded).records():
        if item.kind is Kind.RESET:
            last = straight.reset(item.seed, item.prompt)
        elif item.kind is Kind.STEP:
            last = straight.step(np.frombuffer(item.body, np.float32))
        elif item.kind is Kind.ANCHOR:
            last = straight.anchor(np.frombuffer(item.body, np.uint8).reshape(8, 8, 3))
        if straight.id == frame:
            break
    engine = seek(recorded, SmallWorld(), frame)
    assert (engine.id, engine.chain) == (frame, last.chain)
    for action in actions(more, seed=frame):
        a, b = straight.step(action), engine.step(action)
        assert a.chain == b.chain
        assert np.array_equal(a.picture, b.picture)


def test_seek_beyond_the_end(recorded: Path) -> None:
    with pytest.raises(WorldlineError, match="holds no frame 32"):
        seek(recorded, SmallWorld(), 32)


def test_recording_from_the_middle_of_a_session(tmp_path: Path) -> None:
    engine = Engine(SmallWorld())
    engine.reset(1)
    for action in actions(20):
        engine.step(action)
    engine.start_recording(tmp_path / "late.wlr")
    for action in actions(15, 1):
        engine.step(action)
    assert engine.stop_recording() == 15
    engine.step(actions(1)[0])
    verdict = verify(tmp_path / "late.wlr", SmallWorld())
    assert verdict.ok
    assert verdict.frames == 15
    assert seek(tmp_path / "late.wlr", SmallWorld(), 30).id == 30


def test_readable_from_elsewhere_while_being_written(tmp_path: Path) -> None:
    """What is on the disk is whole records at every moment but for a torn tail, and reaches it within a second."""
    path = tmp_path / "live.wlr"
    stepped, go_on = threading.Event(), threading.Event()

    def play() -> None:
        with Engine(SmallWorld(), record=path) as engine:
            engine.reset(0)
            for action in actions(50):
                engine.step(action)
            stepped.set()
            go_on.wait(10)

    player = threading.Thread(target=play)
    player.start()
    assert stepped.wait(10)
    for _ in range(100):
        if Recording(path).frames == 51:
            break
        threading.Event().wait(0.05)
    assert Recording(path).frames == 51
    assert not Recording(path).complete
    assert verify(path, SmallWorld()).ok
    go_on.set()
    player.join()
    assert Recording(path).complete


def test_a_killed_process_leaves_a_replayable_file(tmp_path: Path) -> None:
    path = tmp_path / "killed.wlr"
    code = (
        "import time; from engine_world import SmallWorld, actions; from worldline.engine.runtime import Engine\n"
        f"engine = Engine(SmallWorld(), record={str(path)!r}); engine.reset(0)\n"
        "for action in actions(40): engine.step(action)\n"
        "time.sleep(1); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    verdict = verify(path, SmallWorld())
    assert (verdict.ok, verdict.complete, verdict.frames) == (True, False, 41)


def test_recordings_are_never_overwritten(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldlineError, match="exists already"):
        Engine(SmallWorld(), record=recorded)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorldlineError, match="cannot record there"):
        Engine(SmallWorld(), record=tmp_path / "file" / "x.wlr")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_a_full_disk_ends_the_recording_not_the_session(tmp_path: Path) -> None:
    path = tmp_path / "full.wlr"
    code = (
        "import resource, signal, time\n"
        "from engine_world import SmallWorld, actions\n"
        "from worldline.core.errors import WorldlineError\n"
        "from worldline.engine.runtime import Engine\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        f"engine = Engine(SmallWorld(), record={str(path)!r}); engine.reset(0); told = []\n"
        "for action in actions(120):\n"
        "    time.sleep(0.02)\n"
        "    try: engine.step(action)\n"
        "    except WorldlineError as error: told.append(str(error))\n"
        "print(len(told), engine.id, engine.recording, told[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
    )
    assert done.stdout.startswith("1 120 None "), done.stdout
    assert "the recording stopped (File too large)" in done.stdout
    verdict = verify(path, SmallWorld())
    assert verdict.ok
    assert not verdict.complete
    assert 50 < verdict.frames < 120
