from __future__ import annotations

from pathlib import Path

import pytest
from little_world import little_bundle, little_worlds

from worldline.edge.world import IntegerWorld
from worldline.model import World


@pytest.fixture(scope="module", params=[("none", 8), ("normalise", 4)], ids=["none-8", "normalise-4"])
def worlds(request) -> tuple[World, IntegerWorld]:
    """A world, and the same in integers."""
    return little_worlds(*request.param)


@pytest.fixture
def bundle(worlds, tmp_path) -> Path:
    return little_bundle(*worlds, tmp_path)
