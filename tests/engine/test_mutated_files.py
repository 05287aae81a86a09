"""A thousand spoilt replay files: each is found out or harmless, and none crashes or hangs the reader."""

from pathlib import Path

import pytest
from engine_world import SmallWorld
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_replay_file import record, records_of

from worldline.core.errors import WorldlineError
from worldline.engine.recording import Recording
from worldline.engine.replay import verify


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("mutated")
    record(folder / "session.wlr")
    return folder, (folder / "session.wlr").read_bytes()


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, int, int, bytes]]:
    kinds = st.sampled_from(("flip", "cut", "swap", "repeat", "remove", "insert", "zero", "version"))
    place = st.integers(0, 2**31)
    return draw(st.lists(st.tuples(kinds, place, place, st.binary(min_size=1, max_size=40)), min_size=1, max_size=3))


def mutate(data: bytes, kind: str, a: int, b: int, noise: bytes) -> bytes:
    if len(data) < 9:
        return data
    at = a % len(data)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << b % 8)]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + noise + data[at:]
    if kind == "zero":
        return data[:at] + bytes(len(data) - at)
    if kind == "version":
        return data[:7] + bytes([b % 256]) + data[8:]
    try:
        records = records_of(data)
    except Exception:  # an earlier mutation left nothing to walk along
        return data
    _, start, end = records[a % len(records)]
    _, other_start, other_end = records[b % len(records)]
    if kind == "repeat":
        return data[:end] + data[start:end] + data[end:]
    if kind == "remove":
        return data[:start] + data[end:]
    if start > other_start:
        start, end, other_start, other_end = other_start, other_end, start, end
    return data[:start] + data[other_start:other_end] + data[end:other_start] + data[start:end] + data[other_end:]


@settings(max_examples=1000, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=mutations())
def test_a_spoilt_file_is_found_out_or_harmless(recorded: tuple[Path, bytes], changes: list) -> None:
    folder, data = recorded
    spoilt = data
    for change in changes:
        spoilt = mutate(spoilt, *change)
    path = folder / "spoilt.wlr"
    path.write_bytes(spoilt)
    try:
        verdict = verify(path, SmallWorld())
    except WorldlineError:
        return
    if not verdict.ok:
        return
    # what still verifies holds the recorded frames or the first of them, and then it says that it is not whole
    kept, whole = list(Recording(path).records()), list(Recording(folder / "session.wlr").records())
    assert kept == whole[: len(kept)]
    assert verdict.complete == (len(kept) == len(whole))
