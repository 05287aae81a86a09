"""The microbenchmarks: work declared as it is, sentences that follow from the figures, wrong guesses shown as wrong."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from worldline.bench import micro, micro_report
from worldline.core.errors import WorldlineError
from worldline.core.files import read_json

SMALL = micro.MicroConfig(seconds=0.004, warmup_seconds=0.001, largest_mib=1, largest_gemm=128)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("micro")
    config = micro.MicroConfig(**{**vars(SMALL), "reports": str(folder / "reports"), "publish": str(folder / "phases")})
    report = micro.run(config)
    published = {path.name for path in (folder / "phases").iterdir()}
    assert published == {"phase0_week1.md", "phase0_week2.md", "phase0_roofline.svg"}
    assert {path.name for path in report.parent.iterdir()} == {"report.md", "result.json", "roofline.svg"}
    return dict(read_json(report.with_name("result.json")))


@pytest.fixture
def result(measured: dict[str, Any]) -> dict[str, Any]:
    """A measured result with times put in by hand: 1 us a call, 8 GFLOP/s, copies of 2 and 1 GB/s."""
    known = copying.deepcopy(measured)
    known["timing"]["cuda"] = None
    for case in known["cases"]:
        ns = max(50.0, 1000.0 * case["calls"], case["bytes"] / 2, case["operations"] / 8)
        known["timing"]["cpu"][case["name"]]["host"] |= {"median": ns, "quartiles": [ns, ns]}
    known["timing"]["cpu"]["copy 1 MiB"]["host"]["median"] = 2.0 * 2**20
    return known


@pytest.mark.parametrize(
    ("name", "nbytes", "operations"),
    [
        ("nothing", 0, 0),
        ("empty operation", 0, 0),
        ("gemm 64 x 64 x 64", 3 * 64 * 64 * 4, 524_288),
        ("gemm 1 x 448 x 1344", (448 + 602_112 + 1344) * 4, 1_204_224),
        ("copy 4 KiB", 8192, 0),
        ("add 4 KiB", 12_288, 1024),
        ("sigmoid 4 KiB", 8192, 1024),
        ("chain of 100, eager", 537_600, 44_800),
        ("chain of 100, bound", 537_600, 44_800),
    ],
)
def test_work_is_declared_as_counted_by_hand(name: str, nbytes: int, operations: int) -> None:
    (case,) = (case for case in micro.cases(SMALL) if case.name == name)
    assert (case.bytes, case.operations) == (nbytes, operations)


def test_cases_do_what_they_declare() -> None:
    """The operations torch counts, and the chains' results."""
    from torch.utils.flop_counter import FlopCounterMode

    for case in (micro.gemm(3, 5, 7), micro.gemm(1, 448, 1344)):
        call = case.make(torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == case.operations
    eager = micro.chain(bound=False).make(torch.device("cpu"))()
    run, bound = micro.bound_chain()
    run()
    assert torch.equal(bound, eager)
    assert bound[0, 0].item() == pytest.approx(0.5)  # where x -> (x + 0.5) / 2 comes to rest
    copied = micro.copy(64).make(torch.device("cpu"))()
    assert isinstance(copied, torch.Tensor)
    assert copied.tolist() == [1.0] * 16


def test_time_is_the_median_of_a_known_clock() -> None:
    def ticks() -> Iterator[int]:
        now = 0
        while True:
            now += 20_000
            yield now

    clock = ticks()
    timing = micro.time_host(lambda: None, 0.01, 0.001, clock=lambda: next(clock))
    assert timing.calls_a_turn > 1
    assert timing.median == 20_000 / timing.calls_a_turn
    assert timing.turns >= 9


def test_a_case_belongs_to_its_longest_bound(result: dict[str, Any]) -> None:
    assert micro_report.ceilings(result) == {"gemm": 8.0, "copy": 2.0, "memory": 1.0, "call_ns": 1000.0}
    rows = {row["name"]: row for row in micro_report.rows(result)}
    governed = {
        "empty operation": "call",
        "gemm 128 x 128 x 128": "compute",
        "gemm 1 x 448 x 1344": "bandwidth",
        "add 1 MiB": "bandwidth",
    }
    assert {name: rows[name]["governed"] for name in governed} == governed
    assert rows["add 1 MiB"]["explains"] == pytest.approx(1.0)
    assert rows["copy 1 MiB"]["explains"] == pytest.approx(0.5)


def test_a_wrong_expectation_is_shown_as_wrong(result: dict[str, Any]) -> None:
    (case,) = (case for case in result["cases"] if case["name"] == "add 1 MiB")

    def told(value: float) -> tuple[str, str]:
        case["expected"] |= {"value": value, "unit": "GB/s", "factor": 1.5, "because": "a guess of ours"}
        (line,) = (line for line in micro_report.render(result).splitlines() if line.startswith("| add 1 MiB "))
        return line, micro_report.week1(result)

    line, answer = told(2.2)
    assert line.endswith("| 2 | right |")
    assert "a guess of ours" not in answer
    line, answer = told(20)
    assert line.endswith("| 2 | **wrong** |")
    assert "add 1 MiB: expected 20 GB/s (a guess of ours), came 2: 10.0 times less." in answer


def test_sentences_follow_from_the_figures(result: dict[str, Any]) -> None:
    for text in (micro_report.render(result), micro_report.week1(result), micro_report.week2(result)):
        assert "No CUDA device was at hand in this run." in text
    assert "2.0 times less: its bytes come from memory" in micro_report.week2(result)
    result["timing"]["cpu"]["copy 1 MiB"]["host"]["median"] = 2.0**20
    assert "2.0 GB/s, about as much." in micro_report.week2(result)
    assert "`add 1 MiB` moves 2.0 GB/s, `add 4 KiB` 2.0: the larger one is hardly slower" in micro_report.week2(result)
    assert "0 of 14 cases: none of the three alone. none." in micro_report.week1(result)
    result["timing"]["cpu"]["add 1 MiB"]["host"]["median"] *= 3
    assert "moves 0.7 GB/s, `add 4 KiB` 2.0: the larger one waits for memory." in micro_report.week2(result)
    assert "1 of 14 cases: none of the three alone. add 1 MiB." in micro_report.week1(result)
    result["timing"]["load"]["before"][0] = 3.0
    assert "other work ran on these cores" in micro_report.render(result)
    result["timing"]["load"]["before"][0] = 0.1
    assert "other work ran on these cores" not in micro_report.render(result)


def test_device_and_host_time_are_set_side_by_side(result: dict[str, Any]) -> None:
    """With times put in by hand: no device is needed to read a result that has some."""
    times = result["timing"]["cpu"]
    named = [case["name"] for case in (*result["cases"], *result["cuda_cases"])]
    one = times["copy 4 KiB"]["host"] | {"median": 5000.0}
    result["timing"]["cuda"] = {name: {"host": one | {"median": 4000.0}, "events": dict(one)} for name in named}
    result["timing"]["cuda"]["synchronise"]["events"] |= {"median": 20_000.0}
    answer = micro_report.week1(result)
    assert (
        f"In 1 of {len(named)} cases the call came back in less than half of the device's time: synchronise." in answer
    )
    assert "was at hand" not in answer


def test_the_roofline_holds_every_case_that_moves_bytes(result: dict[str, Any]) -> None:
    picture = micro_report.roofline(result)
    assert [case["name"] for case in result["cases"] if case["bytes"] and case["name"] not in picture] == []


def test_no_time_to_measure_is_refused() -> None:
    with pytest.raises(WorldlineError, match="seconds > 0"):
        micro.run(micro.MicroConfig(seconds=0))


@pytest.mark.gpu
def test_on_a_device_every_case_has_both_times(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = micro.MicroConfig(**{**vars(SMALL), "reports": str(tmp_path)})
    result = read_json(micro.run(config).with_name("result.json"))
    named = {case["name"] for case in (*result["cases"], *result["cuda_cases"])}
    assert result["timing"]["cuda"].keys() == named
    assert all(row["events"]["median"] > 0 and row["host"]["median"] > 0 for row in result["timing"]["cuda"].values())
