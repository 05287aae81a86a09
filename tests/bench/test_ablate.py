"""The grid of trainings, for real: what it refuses, that its figures are the runs' own, that a failure is told."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from worldline.bench.ablate import AblateConfig, _prepare, run
from worldline.bench.ablate_bars import judge
from worldline.bench.ablate_figures import draw
from worldline.bench.ablate_report import summarise
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json

BASE = (
    "model.latent_dim=8 model.hidden=16 frozen.grounding=0 frozen.motion=0 joint.features=0 joint.loose_frames=0 "
    "joint.batch=4 joint.pixel_frames=4 frozen.batch=4 frozen.rollout=12 frozen.rollout_start=0 validation_windows=4"
)
DATA, COLLECTED = Path("datasets/ablate/two_room"), "episodes=60 steps=60"
GRID = AblateConfig(
    worlds=(f"two_room: {COLLECTED}",),
    variants=("ours:", "lewm: objective=lewm frozen.steps=0"),
    terms=("broken: joint.lr_encoder=1e20 joint.lr_predictor=1e20",),
    base=BASE,
    seeds=1,
    minutes=0.08,
    workers=2,
    publish="docs/published.md",
    references="encoder_updates=150 encoder_batch=32 actions_updates=20 actions_batch=16 horizon=10",
    test="episodes=8 steps=60 seed=1",
    evaluate="horizon=10 windows=200 draws=100 train_frames=500 validation_frames=200",
    evaluate_first="bounds=true",
    plan="offsets=[5,10] starts=3 planner_seeds=2 planner.samples=8 planner.iterations=2 planner.elites=2 "
    "planner.steps=3 oracle_planner.samples=4 oracle_planner.iterations=1 oracle_planner.elites=2 "
    "oracle_planner.steps=2",
)


@pytest.mark.parametrize("variants", [(), ("base:",), ("base:", "model.hidden=3"), ("base:", ": model.hidden=3")])
def test_variants_want_names(variants: tuple[str, ...]) -> None:
    with pytest.raises(WorldlineError, match="variant"):
        AblateConfig(worlds=("two_room:",), variants=variants)


@pytest.mark.parametrize("kept", [True, False])
def test_bars_are_kept_or_not(kept: bool) -> None:
    def row(variant: str, seed: int, success: float, radius: float) -> dict:
        factors = {"seen": {"kept": 0.8 if kept else 0.78, "canonical": 0.99}, "unseen": {"kept": 0, "canonical": 0.5}}
        return {"world": "w", "variant": variant, "seed": seed, "long_steps": 1000, "inside": (0.96, 0.99)[seed],
                "median_radius": radius, "inside_real": 0.98, "median_radius_real": 1.02,
                "growth": 1.9, "factors": factors, "success": {"25": success, "75": success},
                "cpu_seconds": 100 if variant == "a" or kept else 94}  # fmt: skip

    interval = {"low": 0.1, "value": 0.2, "high": 0.3, "each": [0.2, 0.1 if kept else -0.1]}
    theirs = 0.5 if kept else 0.61
    reached = {"low": -0.01, "value": 0.05, "high": 0.2} if kept else {"low": -0.1, "value": -0.06, "high": -0.055}
    pair = {
        "world": "w",
        "variant": "b",
        "seeds": [0, 1],
        "hri": interval,
        "h_star": interval,
        "h_star_each": [[100, 33], [99 if kept else 97, 33]],
        "growth_ratio_each": [0.5, 0.5 if kept else 0.51],
        "success": {"25": reached, "75": reached},
    }
    part = {**pair, "variant": "part", "success": {"25": {"value": -1.0}, "75": {"value": -1.0}}}
    bars = judge(
        {
            "ours": "a",
            "horizon": 100,
            "config": {"variants": ["a: objective=x", "b: objective=y"], "terms": ["part: objective=x y=0"]},
            "runs": [
                *(row("a", seed, 0.55, radius) for seed, radius in enumerate([1.09, 0.9 if kept else 0.89])),
                *(row("b", seed, theirs, 2.0) for seed in (0, 1)),
            ],
            "pairs": [pair, part],
        }
    )
    assert [bar.asked.split()[0] for bar in bars] == [
        *("HRI_100", "H*", "e_100", "CPU", "97%", "every", "success", "success")
    ]
    assert [bar.kept for bar in bars] == [kept] * 8
    assert [bar.verdict for bar in bars[-2:]] == (["yes", "yes, within noise"] if kept else ["no", "no"])
    assert all("b, 2 seeds" in bar.of for bar in bars[-2:]), "what we are without a term is no opponent"


def test_a_grid_is_trained_once_and_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as nothing_yet:
        nothing_yet.setattr("worldline.bench.ablate._finish", lambda *_: "not now")
        with pytest.raises(WorldlineError, match="every run failed"):
            run(GRID)
    report = run(GRID)
    result = read_json(report.parent / "result.json")
    assert [(row["variant"], row["seed"]) for row in result["runs"]] == [("ours", 0), ("lewm", 0)]
    assert list(result["failures"]) == ["two_room broken 0"]
    assert "training stopped at step" in result["failures"]["two_room broken 0"]

    places = {name: Path(f"runs/ablate/two_room/{name}-0") for name in ("ours", "lewm")}
    for row in result["runs"]:
        place = places[row["variant"]]
        told = read_json(place / "evaluation/result.json")
        assert told["dataset"]["test"]["episodes"] == told["windows"]["episodes"] == row["episodes"] == 8
        assert row["hri"] == told["verdict"]["hri"]["10"]
        assert row["error"] == pytest.approx(told["latents"]["error"], rel=1e-4)
        assert row["success"]["10"] == read_json(place / "planning/result.json")["success"]["world"]["10"]["value"]
    ours, lewm = result["runs"]
    assert lewm["updates"][1] == 0
    assert min(*ours["updates"], lewm["updates"][0]) > 1, "the minutes are shared out"
    (pair,) = result["pairs"]
    assert pair["hri"]["value"] == pytest.approx(ours["hri"]["value"] - lewm["hri"]["value"], abs=2e-5)
    draws = [np.load(places[name] / "evaluation/draws.npz")["hri_10"][1:] for name in ("ours", "lewm")]
    assert pair["hri"]["low"] == pytest.approx(np.percentile(draws[0] - draws[1], 2.5), abs=1e-5)
    assert pair["success"]["5"]["value"] == pytest.approx(ours["success"]["5"] - lewm["success"]["5"], abs=1e-4)
    assert set(result["oracle"]["two_room"]) == {"5", "10"}
    files = [Path(f"reports/ablate/two_room/{name}-0.json") for name in ("lewm", "ours")]
    assert summarise(list(map(read_json, files)), "ours")["pairs"] == [pair], "whichever run came first"
    assert not summarise([read_json(files[0])], "ours")["pairs"], "nobody takes the place of a run that failed"
    for text in (report.read_text(), Path("docs/published.md").read_text()):
        assert "two_room broken 0: training stopped at step" in text
        assert f"| lewm | {lewm['hri']['value']:.2f}" in text
        assert f"| lewm | {lewm['bound']['residual']:.2f}" in text
    published = Path("docs/published.md").read_text()
    assert "`edge`: not yet measured" in published
    (frontier,) = re.findall(r"\]\((.*frontier\.svg)\)", published)
    assert Path("docs", frontier).read_text().startswith("<svg")
    with_term = {
        **result,
        "config": {**result["config"], "terms": ["part: joint.sigreg=0"]},
        "runs": [*result["runs"], {**ours, "variant": "part"}],
    }
    assert [name for name, svg in draw(with_term).items() if ">part<" in svg] == ["terms"]

    # other options of a later stage: only that one is run again
    done = [places["lewm"] / name for name in ("result.json", "evaluation/result.json")]
    before = [path.stat().st_mtime_ns for path in done]
    for name in places:
        Path(f"reports/ablate/two_room/{name}-0.json").unlink()
    grid = dataclasses.replace(GRID, plan=f"{GRID.plan} budget=1")
    result = read_json(run(dataclasses.replace(grid, terms=())).parent / "result.json")
    assert result["failures"] == {}
    assert [path.stat().st_mtime_ns for path in done] == before
    assert read_json(places["lewm"] / "planning/result.json")["config"]["budget"] == 1

    kept = {path: path.read_text() for path in Path("reports/ablate").rglob("*.json")}
    assert {path.name for path in kept} == {"costs.json", "ours-0.json", "lewm-0.json"}
    shutil.rmtree("runs")
    again = read_json(run(dataclasses.replace(grid, train=False)).parent / "result.json")
    assert {key: again[key] for key in ("runs", "pairs", "oracle")} == {
        key: result[key] for key in ("runs", "pairs", "oracle")
    }
    assert again["not_run"] == ["two_room broken 0"]
    assert not Path("runs").exists(), "evidence is enough"
    assert {path: path.read_text() for path in Path("reports/ablate").rglob("*.json")} == kept
    _prepare(dataclasses.replace(GRID, references="encoder_updates=20 actions_updates=20"), DATA, "two_room", COLLECTED)
    assert read_json(DATA / "references/references.json")["config"]["encoder_updates"] == 20, "an older pack goes"
    with pytest.raises(WorldlineError, match="is evidence of a run with evaluate"):
        run(dataclasses.replace(grid, evaluate="horizon=20"))
