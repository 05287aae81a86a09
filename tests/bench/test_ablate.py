"""The comparison of variants: what it refuses, and that its figures are those of the evaluations."""

from pathlib import Path

import pytest

from worldline.bench.ablate import AblateConfig, _report, _row, run
from worldline.core.errors import WorldlineError


@pytest.mark.parametrize("variants", [(), ("base:",), ("base:", "model.hidden=3"), ("base:", ": model.hidden=3")])
def test_variants_want_names(variants: tuple[str, ...]) -> None:
    with pytest.raises(WorldlineError, match="variant"):
        AblateConfig(variants=variants)


def test_a_variant_that_fails_stops_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorldlineError, match="worldline train ended with status 2"):
        run(AblateConfig(data="nothing-here", variants=("base:", "wide: model.hidden=768")))
    assert not list(tmp_path.rglob("report.md"))


def test_the_report_divides_by_each_variants_own_minutes() -> None:
    def evaluation(value: float, r: list[float | None]) -> dict:
        curves = {"r": r}
        verdict = {"valid": value > 0, "hri": {"1": None, "10": {"value": value}}}
        return {"verdict": verdict, "factors": {"agent": curves}}

    rows = [
        _row("base", "", 2.0, evaluation(0.5, [0.97, *[0.5] * 9, 0.9])),
        _row("wide", "model.hidden=768", 4.0, evaluation(0.0, [0.97, *[None] * 10])),
    ]
    text = _report(
        {
            "data": "d",
            "base": "joint.steps=1",
            "variants": [row["figures"] for row in rows],
            "timing": {"cpu_minutes": {row["name"]: row["cpu_minutes"] for row in rows}},
            "provenance": {"commit": "c", "command": "x", "machine": {"processor": "p", "cores": 2}},
        }
    )
    assert "| base |  | 2.0 | n/a | 0.50 | 0.250 | 0.97, 0.50, 0.90 |" in text
    assert "| wide (invalid) | `model.hidden=768` | 4.0 | n/a | 0.00 | 0.000 | 0.97, n/a, n/a |" in text
