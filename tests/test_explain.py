"""A page about a run: its sentences follow from the ledger, and a planted delay is named."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from worldline.cli import main
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.engine.ledger import Ledger
from worldline.explain import ExplainConfig, explain, tell

MS = 1_000_000


def make_ledger(frames: int = 400, slow_every: int = 0, growth: float = 0.0, late: bool = False) -> Ledger:
    """Frames of 4 ms at 25 a second: 1 ms of step, 3 ms of decode; some take 12 ms more to decode."""
    ledger, rng = Ledger(("step", "decode"), frames), np.random.default_rng(0)
    for number in range(frames):
        begin = 10 * MS + number * 40 * MS + (39 * MS if late and number % 10 == 0 else 0)
        step = MS + int(rng.integers(0, 20_000))
        decode = 3 * MS + int(growth * number) + int(rng.integers(0, 20_000))
        if slow_every and number % slow_every == 1:
            decode += 12 * MS
        deadline = 10 * MS + (number + 1) * 40 * MS
        ledger.write(number, begin, deadline, [(begin, step), (begin + step, decode)])
        ledger.close()
        ledger._times[number, 2] = begin + step + decode + 5000
        ledger._spans[number, 2] = (begin + step + decode, 5000)
    return ledger


def test_the_sentences_follow_from_the_ledger() -> None:
    told = tell(make_ledger(), 25.0)
    where = " ".join(told["Where time goes"])
    assert "400 frames: half take up to 4.0" in where
    assert "the median uses 10% of that" in where
    assert "decode 75%, step 25%. 100.00% of it is accounted for" in where
    assert "Frames begin 40.00 ms apart" in where
    assert "400 of 400 deadlines were kept" in where
    assert told["What was surprising"] == ["Nothing."]
    assert "The largest lever is decode: were it free, a frame would take 1.0" in told["What would help"][0]
    assert "4.0 times as many" in told["What would help"][0]


def test_what_is_planted_is_named() -> None:
    slow = " ".join(tell(make_ledger(slow_every=20), 25.0)["What was surprising"])
    assert "20 frames took over 2 times the median; in 20 of them it was decode" in slow
    assert "12.0" in slow
    assert "decode is uneven" in slow
    assert any("slower: 3.7" in each for each in tell(make_ledger(growth=10_000), 25.0)["What was surprising"])
    late = " ".join(tell(make_ledger(late=True), 25.0)["What was surprising"])
    assert "Of 40 missed deadlines 40 were of frames that began too late" in late


def test_a_ledger_is_saved_and_read_again(tmp_path: Path) -> None:
    ledger = make_ledger(50)
    ledger.save(tmp_path / "a.ledger.npz", {"fps": 25.0}, ids_from=10)
    loaded, info = Ledger.load(tmp_path / "a.ledger.npz")
    assert info["fps"] == 25.0
    assert [row.spans for row in loaded.rows()] == [row.spans for row in ledger.rows(40)]
    (tmp_path / "b.ledger.npz").write_bytes(b"nonsense")
    np.savez(tmp_path / "c.ledger.npz", info=np.array("{}"))
    for name in "bcd":
        with pytest.raises(WorldlineError, match="not a frame ledger"):
            Ledger.load(tmp_path / f"{name}.ledger.npz")
    with pytest.raises(WorldlineError, match="record another session"):
        explain(ExplainConfig(file=str(tmp_path / "d.wlr")))


def test_the_page_and_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = {"fps": 25.0, "fingerprint": {"weights": "<none>"}, "recording": "a.wlr"}
    make_ledger(slow_every=20).save(tmp_path / "a.ledger.npz", info)
    assert main(["explain", str(tmp_path / "a.wlr")]) == 0
    shown = capsys.readouterr().out
    page = (tmp_path / "a.explained/index.html").read_text()
    for sentences in read_json(tmp_path / "a.explained/result.json")["sentences"].values():
        assert all(sentence in page and sentence in shown for sentence in sentences)
    assert "&lt;none&gt;" in page
    assert not re.search(r"""(src|href)=["']https?:|url\(""", page.replace("url(#", ""))  # it needs no network
    events = json.loads((tmp_path / "a.explained/trace.json").read_text())["traceEvents"]
    frames = [each for each in events if each["name"].startswith("frame ")]
    stages = [each for each in events if each.get("tid") == 2 and each["ph"] == "X"]
    assert len(frames) == 400
    assert sum(each["dur"] for each in stages) == pytest.approx(sum(each["dur"] for each in frames))
