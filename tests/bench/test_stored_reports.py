"""Every stored report is what today's code writes of the figures beside it."""

from importlib import import_module
from pathlib import Path

import pytest

from worldline.core.files import read_json

REPORTS = Path(__file__).parents[2] / "reports"
RENDERERS = {
    "ablate": "bench.ablate_report:render",
    "bench-determinism": "bench.determinism:render",
    "bench-edge": "bench.edge_report:report",
    "bench-feed": "bench.feed:render",
    "bench-loader": "bench.loader_report:render",
    "bench-optimise": "bench.optimise:render",
    "bench-plan": "bench.plan:render",
    "bench-play": "bench.play:render",
    "bench-storm": "bench.storm:render",
    "bench-train": "bench.train:render",
    "bench-update": "bench.update:render",
    "bottleneck": "bench.bottleneck_report:render",
    "engine": "bench.engine:render",
    "memory": "train.memory_report:render",
    "micro": "bench.micro_report:render",
    "pretrain-probe": "bench.pretrain:render",
    "soak": "bench.soak:render",
}
STORED = sorted(REPORTS.glob("????-??-??-*/report.md"))


@pytest.mark.parametrize("report", STORED, ids=lambda path: path.parent.name)
def test_it_is_what_the_code_writes(report: Path) -> None:
    result = read_json(report.with_name("result.json"))
    module, name = RENDERERS[result["kind"]].split(":")
    render = getattr(import_module(f"worldline.{module}"), name)
    assert render(result) == report.read_text(encoding="utf-8"), "measure again, or write it again from its result.json"
