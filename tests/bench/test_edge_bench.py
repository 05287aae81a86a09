"""TensorFlow Lite Micro's arena for a graph of ours is the one for the graph that a converter made."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from worldline.bench.edge import DS96, ideal, resized
from worldline.bench.edge_report import report
from worldline.core.files import read_json
from worldline.edge.arena_picture import chain_panel, draw
from worldline.edge.schedule import plan_rows, plan_tiles
from worldline.edge.tflite import read_chain

ROOT = Path(__file__).parents[2]
tflite_micro = pytest.importorskip("tflite_micro", reason="pip install --pre tflite-micro")


def test_graphs_want_the_arena_that_converted_ones_want():
    from worldline.bench.tflm import arena_bytes

    chain = read_chain(DS96)
    found = arena_bytes(chain, pads=True)
    runtime, model = tflite_micro.runtime, DS96.read_bytes()
    runtime.Interpreter.from_bytes(model, arena_size=found + 256)  # it holds its parts in other tensors
    with pytest.raises(RuntimeError):
        runtime.Interpreter.from_bytes(model, arena_size=found - 256)
    assert arena_bytes(chain, pads=False) < 0.75 * found
    small = resized(chain, 48)
    assert small.run(np.zeros((1, 48, 48, 3), np.int8)).shape == (1, 64)
    assert ideal(small) == ideal(chain) // 4


def test_a_picture_shows_every_buffer():
    chain = read_chain(DS96)
    plans = [plan_rows(chain), plan_tiles(chain, 2, (8, 8))]
    svg = draw([chain_panel(str(i), chain, plan) for i, plan in enumerate(plans)])
    for plan in plans:
        for ring in plan.rings:
            assert f"{ring.size:,} bytes at {ring.at:,}</title>" in svg


def test_the_published_page_is_the_newest_result():
    """Drawn from its figures, and every row of a table as wide as its head."""
    newest = max(ROOT.glob("reports/*-edge/result.json"))
    page = (ROOT / "docs/reports/tinyengine_memory.md").read_text()
    assert page == report(read_json(newest))
    rows = [line.count("|") if line.startswith("|") else 0 for line in page.splitlines()]
    for before, after in pairwise(rows):
        assert not before or not after or before == after
