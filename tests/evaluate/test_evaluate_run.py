"""From a small dataset and two untrained worlds to result and report: two processes, the same figures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_dataset import QUICK, world_at

from worldline.cli import main
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.data.lerobot import SIDECAR, Dataset, open_dataset
from worldline.data.two_room import MAX_SPEED, RESPONSE
from worldline.evaluate.run import EvaluateConfig, evaluate
from worldline.evaluate.twins import NUDGE, twin_divergence
from worldline.evaluate.windows import choose_windows
from worldline.model.checkpoint import save_world
from worldline.model.references import ACTIONS_ONLY, CARD, load_references
from worldline.model.world import World, WorldConfig
from worldline.train.references import ReferencesConfig, make_references


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def without_times(path: Path) -> str:
    figures = read_json(path / "result.json")
    assert figures.pop("timing")["seconds"] > 0
    assert figures["provenance"].pop("time")
    figures["provenance"].pop("command")  # pytest's here, python's there
    return json.dumps(figures)


def test_two_processes_agree_and_report(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, other = world_at(tmp_path / "ours", dataset, 0), world_at(tmp_path / "other", dataset, 1)
    config = EvaluateConfig(
        checkpoint=ours,
        data=str(dataset.path),
        out=str(tmp_path / "out"),
        horizon=20,
        windows=220,
        draws=100,
        twin=other,
        compare=other,
        train_frames=1500,
        bounds=True,
    )
    program = "import sys; from worldline.evaluate.run import *; evaluate(eval(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, repr(config)], check=True)
    alone = without_times(tmp_path / "out")
    first = evaluate(config)
    assert without_times(first) == alone
    figures = read_json(first / "result.json")
    assert figures["kind"] == "evaluate"
    assert figures["verdict"]["num_windows"] == 220
    assert set(figures["factors"]["agent"]["r_naive"]) == {
        "persistence",
        "standing still",
        "constant velocity",
        "actions only",
        "action-free twin",
        "mean",
    }
    assert set(figures["compare"]["hri_difference"]) == {"10"}
    long = figures["long_rollouts"]
    assert long["steps"] == 70 - 2
    for curve in ("inside", "median_radius"):
        imagined, real = long[f"{curve}_curve"], long[f"{curve}_real_curve"]
        assert len(imagined) == len(real) == 69
        assert imagined[0] == real[0]  # where imagination starts
        assert imagined != real
    assert len(figures["bound"]["error"]) == figures["windows"]["episodes"]
    assert figures["bound"]["held"] == 1.0
    assert len(figures["twins"]["apart"]) == 20
    with np.load(first / "draws.npz") as draws:
        assert draws["windows"].shape == (220, 2)
        hri, h_star = figures["verdict"]["hri"]["10"], figures["verdict"]["h_star"]
        expected = [hri["value"], hri["low"], hri["high"]]
        assert np.allclose([draws["hri_10"][0], *np.percentile(draws["hri_10"][1:], (2.5, 97.5))], expected, atol=1e-5)
        assert (h_star["steps"], len(draws["h_star"])) == (draws["h_star"][0], 101)
    assert "H*" in capsys.readouterr().out
    html = (first / "report.html").read_text()
    assert "prefers-color-scheme: dark" in html
    assert "What is bounded" in html
    assert not re.search(r"""(src|href)=["']?(http|//|/)""", html), "the page must need no other file"
    assert "#0072b2" not in html.split("</style>")[1], "figures take their colours from the page"
    assert (first / "filmstrip.png").stat().st_size > 10_000


def test_twins_part_as_the_world_parts_them(dataset: Dataset, tmp_path: Path) -> None:
    """In the open, two_room's agent answers a push within some steps, and then stays as far off as it was pushed."""
    apart = np.median(twin_divergence(dataset, horizon=20, count=6), axis=0)
    states = np.concatenate([dataset.state(e) for e in dataset.split("test")])[:, list(dataset.spec.factors[0].columns)]
    pushed = [NUDGE * MAX_SPEED * dataset.actions(e).std(axis=0) / states.std(axis=0) for e in dataset.split("test")]
    pushes = np.sqrt(np.square(pushed).mean(axis=1))
    assert apart.shape == (20,)
    for h, share in ((1, RESPONSE), (10, 1.0)):
        assert 0.8 * share * pushes.min() < apart[h - 1] < 1.25 * share * pushes.max()
    copy = shutil.copytree(dataset.path, tmp_path / "unknown")
    (copy / SIDECAR).unlink()
    with pytest.raises(WorldlineError, match="does not say how it was made"):
        twin_divergence(open_dataset(copy), horizon=20, count=6)


def test_the_reference_pack_is_kept_and_guarded(dataset: Dataset, tmp_path: Path) -> None:
    folder = dataset.path / "references"
    before = (folder / CARD).read_bytes()
    assert make_references(dataset, QUICK) == folder
    assert (folder / CARD).read_bytes() == before
    pack = load_references(dataset.path, dataset.fingerprint, dataset.spec)
    assert pack.r2["agent"] > 0.8
    forecast = pack.actions_only(torch.zeros(3, 5, 2))
    assert forecast.shape == (3, 6, 2)
    later = pack.actions_only(torch.cat([torch.zeros(3, 3, 2), torch.ones(3, 2, 2)], dim=1))
    assert torch.equal(forecast[:, :4], later[:, :4]), "the forecast at h has seen the actions before h only"
    assert not torch.equal(forecast[:, 4:], later[:, 4:])
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask()}
    with pytest.raises(WorldlineError, match="belongs to other data"):
        load_references(dataset.path, "another", dataset.spec)
    with pytest.raises(WorldlineError, match="worldline references"):
        load_references(tmp_path, dataset.fingerprint, dataset.spec)
    weights = folder / ACTIONS_ONLY
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WorldlineError, match="changed since"):
        load_references(dataset.path, dataset.fingerprint, dataset.spec)
    weights.write_bytes(whole)


def test_a_killed_process_leaves_nothing_that_stays(dataset: Dataset) -> None:
    left_over = dataset.path / ".references.12345.tmp"
    left_over.mkdir()
    (left_over / ACTIONS_ONLY).write_bytes(b"half")
    shutil.move(dataset.path / "references", kept := dataset.path / "kept")
    try:
        make_references(dataset, replace(QUICK, encoder_updates=20))
        assert not left_over.exists()
    finally:
        shutil.rmtree(dataset.path / "references", ignore_errors=True)
        shutil.move(kept, dataset.path / "references")


def test_the_command_makes_the_pack_that_its_options_ask_for(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.path, copy := tmp_path / "copy")
    options = ["image_size=32", "encoder_updates=20", "actions_updates=20", "horizon=10", "encoder_batch=4"]
    assert main(["references", str(copy), *options]) == 0
    asked = {word.split("=")[0]: int(word.split("=")[1]) for word in options}
    assert read_json(copy / "references" / CARD)["config"] == ReferencesConfig(**asked).identity()  # type: ignore[arg-type]
    assert (copy / ".cache" / "frames-32.npy").exists()


@pytest.mark.parametrize("wrong", [{"actions_updates": 10}, {"encoder_updates": 0}, {"horizon": 0}, {"image_size": 50}])
def test_impossible_reference_packs_are_refused(wrong: dict) -> None:
    with pytest.raises(WorldlineError, match=f"references: {next(iter(wrong))} must be"):
        ReferencesConfig(**wrong)


def test_a_pack_that_sees_nothing_ends_before_anything_is_written(dataset: Dataset, tmp_path: Path) -> None:
    card = dataset.path / "references" / CARD
    before = card.read_bytes()
    pack = json.loads(before)
    for factor in pack["factors"].values():
        factor["r2"] = 0.3
    card.write_text(json.dumps(pack))
    try:
        config = EvaluateConfig(
            checkpoint=world_at(tmp_path / "w", dataset, 0),
            data=str(dataset.path),
            out=str(tmp_path / "out"),
            horizon=20,
        )
        with pytest.raises(WorldlineError, match=r"no factor can be scored.* got agent 0\.30"):
            evaluate(config)
        assert not (tmp_path / "out").exists()
    finally:
        card.write_bytes(before)


def test_windows_are_held_out_and_spread(dataset: Dataset) -> None:
    windows = choose_windows(dataset, context=3, horizon=20, count=220)
    assert set(windows.episodes) <= set(dataset.split("test"))
    assert len(windows.index) == len({tuple(pair) for pair in windows.index.tolist()}) == 220
    assert windows.index[:, 1].min() == 2
    assert windows.index[:, 1].max() + 20 == 69
    with pytest.raises(WorldlineError, match=r"0 of \d+ test episodes .* horizon 100"):
        choose_windows(dataset, context=3, horizon=100, count=220)
    with pytest.raises(WorldlineError, match="asked for 50"):
        choose_windows(dataset, context=3, horizon=20, count=50)


def test_a_quantised_world_has_no_bound(dataset: Dataset, tmp_path: Path) -> None:
    config = WorldConfig(latent_dim=8, conv_width=4, conv_head=2, hidden=8, decoder_width=2, projection="quantise")
    path = save_world(tmp_path / "w", World(config, dataset.spec), training={})
    with pytest.raises(WorldlineError, match="its latents jump from one point of a grid to the next"):
        evaluate(EvaluateConfig(checkpoint=str(path), data=str(dataset.path), horizon=20, bounds=True))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"action_names": ("push",), "action_low": (0.0,), "action_high": (1.0,)}, "takes 1 actions"),
        ({"name": "elsewhere"}, "this is a world of elsewhere"),
        ({"step_seconds": 0.5}, "one step of the world lasts 0.5 s"),
    ],
)
def test_another_world_is_refused(dataset: Dataset, tmp_path: Path, other: dict, told: str) -> None:
    spec = replace(dataset.spec, **other)
    config = WorldConfig(latent_dim=8, conv_width=4, conv_head=2, hidden=8, decoder_width=2)
    path = save_world(tmp_path / "w", World(config, spec), training={})
    with pytest.raises(WorldlineError, match=told):
        evaluate(EvaluateConfig(checkpoint=str(path), data=str(dataset.path), horizon=20))
