"""Planned memory beside what torch's own allocator says of real updates, and what fits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks_process import allocated, learner_and_batch
from toy_clips import MODEL, toy_config

from worldline.core.errors import WorldlineError
from worldline.model.video import VideoConfig
from worldline.train import memory
from worldline.train.memory import Need, PlanMemoryConfig, measuring, plan_memory
from worldline.train.memory_report import figures, text, write
from worldline.train.parallel import ParallelConfig, Ranks


@pytest.mark.parametrize("case", ["plain", "checkpointing", "bfloat16"])
def test_it_is_what_the_allocator_gave_out(case: str) -> None:
    parallel = ParallelConfig(checkpointing=case == "checkpointing")
    config = toy_config(Path("none"), parallel=parallel, bfloat16=case == "bfloat16")
    measured = allocated(*learner_and_batch(config, Ranks(0, 1, None, None)))
    with measuring(MODEL, config.mask, config.learner, parallel, ranks=1) as measure:
        assert measure(config.batch).total == pytest.approx(measured, rel=0.1)


def test_ranks_share_what_is_kept_and_nothing_else() -> None:
    config = toy_config(Path("none"))
    needs = []
    for ranks in (1, 4):
        with measuring(MODEL, config.mask, config.learner, ParallelConfig(), ranks) as measure:
            needs += [measure(5), measure(2), measure(5)]
    assert needs[0] == needs[2] != needs[1]  # what was measured before does not count
    assert needs[3] == needs[5] != needs[4]
    one, four = needs[1], needs[4]
    for name in ("parameters", "average", "optimizer"):
        assert getattr(four, name) == pytest.approx(getattr(one, name) / 4, rel=0.02), name
    assert four.activations > 0.8 * one.activations


def test_the_most_clips_that_fit_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bytes that grow a little faster than the line through the first two counts, which so promises too much."""

    tried = []

    @contextmanager
    def pretended(
        model: object, mask: object, learner: object, parallel: ParallelConfig, ranks: int
    ) -> Iterator[Callable[[int], Need]]:
        def measure(clips: int) -> Need:
            tried.append(clips)
            activations = ((100 if parallel.checkpointing else 1000) * clips + clips**2) * 10**6
            return Need(parameters=10**9, average=0, optimizer=0, gradients=0, gathered=0, activations=activations)

        yield measure

    monkeypatch.setattr(memory, "measuring", pretended)
    plan = PlanMemoryConfig(gpus=2, memory_gb=11.0, reserve_gb=1.0)
    choices = plan_memory(plan)
    assert [(choice.checkpointing, choice.offload, choice.clips) for choice in choices] == [
        (False, False, 8),  # 1 + 8.064 GB
        (False, True, 9),  # 9.081 GB
        (True, False, 57),  # 1 + 8.949 GB
        (True, True, 61),  # 9.821 GB
    ]
    assert len(tried) < 15
    write(tmp_path, figures(plan, choices))
    assert "options: batch=114 parallel.checkpointing=true;" in (tmp_path / "report.md").read_text()


def test_what_cannot_fit_is_told() -> None:
    plan = PlanMemoryConfig(model=MODEL, gpus=1, memory_gb=2.0001, reserve_gb=2.0)
    assert text(figures(plan, plan_memory(plan))).count("none fits") == 4
    with pytest.raises(WorldlineError, match="reserve_gb must be less than memory_gb"):
        PlanMemoryConfig(model=VideoConfig(), memory_gb=1.0)
