"""Fifty updates give the curve that was recorded; the tolerance leaves room for another processor's rounding."""

import json
from pathlib import Path

import pytest
from golden_curve import CURVE, make_curve


def test_fifty_updates_follow_the_recorded_curve(tmp_path: Path) -> None:
    record = json.loads(CURVE.read_text())
    found = make_curve(tmp_path)
    assert len(found["loss"]) == 50
    for name, expected in record["curve"].items():
        assert found[name] == pytest.approx(expected, rel=record["relative_tolerance"]), (
            f"{name} has changed; if that is meant, run `{record['generator']}` and say why in the changelog"
        )
