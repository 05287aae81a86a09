"""A small storm against real servers: deadlines counted, bits kept, and every kind of hostile client met."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from worldline.bench import storm
from worldline.bench.storm_clients import KINDS
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = storm.StormConfig(
        checkpoint="pusht",
        sessions=2,
        fps=10.0,
        clients=8,
        seconds=3.0,
        rounds=1,
        turns=2,
        turn_seconds=0.5,
        reports=str(tmp_path_factory.mktemp("reports")),
    )
    return dict(read_json(storm.run(config).with_name("result.json")))


def test_sessions_keep_their_bits_and_each_kind_of_client_was_met(result: dict[str, Any]) -> None:
    assert [replay["ok"] for replay in result["replays"]] == [True, True]
    crowd = result["timing"]["crowd"]
    assert all(row["frames"] + row["missed"] >= 30 for part in storm._PARTS for rows in crowd[part] for row in rows)
    (hostile,) = crowd["hostile"]
    assert hostile.keys() == set(KINDS)
    assert any(end.startswith("closed, 10") for end in hostile["garbage"])
    assert {"closed, 1008", "until the end", "cut"} & hostile["flood"].keys()
    assert hostile["half-open"]


def test_a_report_says_who_did_not_hold(result: dict[str, Any]) -> None:
    known = copy.deepcopy(result)
    for (row,) in known["timing"]["crowd"]["crowded"]:
        row["missed"] = 0
    assert storm.render(known).startswith("# Storms: every session keeps")
    known["timing"]["crowd"]["crowded"][1][0]["missed"] = 1
    assert storm.render(known).startswith("# Storms: NOT every session holds")
    known["timing"]["crowd"]["crowded"][1][0]["missed"] = 0
    known["replays"][0]["ok"] = False
    assert storm.render(known).startswith("# Storms: NOT every session holds")
    for name, milliseconds in (("quiet", 1.0), ("storm", 100.0)):
        for row in known["timing"]["inputs"][name]:
            row["busy_p99_ms"] = milliseconds
    assert "latency SPIKES" in storm.render(known)


def test_too_small_a_storm_is_refused() -> None:
    with pytest.raises(WorldlineError, match="clients=4"):
        storm.run(storm.StormConfig(checkpoint="pusht", clients=1))
