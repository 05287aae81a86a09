"""The optimisations: both ways give the same result, counts are right, and a wrong expectation is shown as wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from toy_world import SPEC
from worldline.bench import optimise
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json
from worldline.model import World, WorldConfig, save_world


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("optimise")
    torch.manual_seed(0)
    world = World(WorldConfig(image_size=32, latent_dim=24, hidden=48), SPEC).eval()
    checkpoint = save_world(folder / "world", world, training={})
    report = optimise.run(
        optimise.OptimiseConfig(
            checkpoint=str(checkpoint), seconds=0.005, reports=str(folder / "reports"), publish=str(folder / "phases")
        )
    )
    assert (folder / "phases" / "phase4_optimisation.md").read_text() == report.read_text()
    return dict(read_json(report.with_name("result.json")))


def test_every_trial_is_on_the_page(measured: dict[str, Any]) -> None:
    page = optimise.render(measured)
    assert all(f"| {trial.name} | {trial.change} |" in page for trial in optimise.TRIALS)


def test_a_wrong_expectation_is_shown_and_set_beside_the_counts(measured: dict[str, Any]) -> None:
    known = copy.deepcopy(measured)
    known["trials"] = [row for row in known["trials"] if row["name"] == "folded norms"]
    (row,) = known["trials"]
    row["expected"] |= {"value": 0.5, "factor": 1.1}
    row["counts"] = [{"calls": 30, "operations": 10**6, "new_bytes": 10**6}, {"calls": 27, "operations": 5 * 10**5}]
    row["counts"][1]["new_bytes"] = 10**6
    known["timing"]["folded norms"]["ratio"] = 0.52
    assert "1 held" in optimise.render(known)
    known["timing"]["folded norms"]["ratio"] = 0.9
    page = optimise.render(known)
    assert "0 held" in page
    assert "- folded norms: x0.90; calls (x0.90) and bytes of new tensors (x1.00) changed by as much" in page
    known["timing"]["folded norms"]["ratio"] = 0.2
    assert "which none of the counts shows (calls x0.90, operations in products x0.50" in optimise.render(known)


def test_counts_are_those_counted_by_hand() -> None:
    a, b, out = torch.rand(4, 5), torch.rand(5, 6), torch.empty(4, 6)
    with torch.inference_mode():
        assert optimise.count(lambda: torch.mm(a, b)) == {"calls": 1, "operations": 240, "new_bytes": 96}
        assert optimise.count(lambda: torch.mm(a, b, out=out)) == {"calls": 1, "operations": 240, "new_bytes": 0}


def test_two_ways_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    world = World(WorldConfig(image_size=32, latent_dim=24, hidden=48), SPEC).eval()
    checkpoint = save_world(tmp_path / "world", world, training={})
    one = torch.ones(3)
    cheat = optimise.Trial(
        name="cheat",
        change="less work",
        expected=optimise.TRIALS[0].expected,
        make=lambda world: (lambda: one * 2, lambda: one),
    )
    monkeypatch.setattr(optimise, "TRIALS", (cheat,))
    with pytest.raises(WorldlineError, match="not the same work"):
        optimise.run(optimise.OptimiseConfig(checkpoint=str(checkpoint), seconds=0.01, reports=str(tmp_path)))
