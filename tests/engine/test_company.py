"""Sessions that step together: nobody's bits depend on the others, and one that fails leaves nobody waiting."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_latent_workload import SPEC, actions, make_world

from worldline.core.errors import WorldlineError
from worldline.engine.recording import Recording
from worldline.engine.replay import verify
from worldline.engine.runtime import Engine
from worldline.engine.workloads.company import Company
from worldline.engine.workloads.latent import LatentWorkload, make_starts, save_starts
from worldline.model import World, WorldConfig
from worldline.model.checkpoint import save_world

SLOTS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_world(tmp_path_factory.mktemp("worlds") / "small", make_world(), training={})
    save_starts(path, make_starts("two_room", context=4, count=3))
    return path


def play(workload: LatentWorkload, seed: int, frames: int, record: Path | None = None) -> tuple[bytes, np.ndarray]:
    """Play in this thread; return the last chain hash and picture."""
    with Engine(workload, record=record, snapshot_every=10) as engine:
        engine.reset(seed)
        for action in actions(frames, seed):
            frame = engine.step(action)
        return frame.chain, frame.picture.copy()


def test_company_changes_nobodys_bits(checkpoint: Path) -> None:
    """Each slot alone, then all at once with other seeds and lengths beside it, twice."""
    alone = {}
    for slot in range(SLOTS):
        company = LatentWorkload.open_company(checkpoint, SLOTS)
        alone[slot] = play(company[slot], slot, 40 + 10 * slot)
    for _ in range(2):
        company = LatentWorkload.open_company(checkpoint, SLOTS)
        with ThreadPoolExecutor(SLOTS) as pool:
            together = list(pool.map(lambda k, c=company: play(c[k], k, 40 + 10 * k), range(SLOTS)))
        for slot, (chain, picture) in enumerate(together):
            assert chain == alone[slot][0]
            assert np.array_equal(picture, alone[slot][1])
    single = play(LatentWorkload.open(checkpoint, mode="graph"), 0, 40)
    assert np.abs(single[1].astype(int) - alone[0][1]).max() <= 1  # the same world, up to rounding


def test_a_slots_recording_is_replayed_in_its_slot(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "slot.wlr"
    company = LatentWorkload.open_company(checkpoint, SLOTS)
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(lambda k: play(company[k], k, 30, path if k == 2 else None), range(SLOTS)))
    recording = Recording(path)
    assert recording.header.fingerprint["slot"] == "2 of 4"
    workload = LatentWorkload.open_for(recording)
    assert workload.fingerprint()["slot"] == "2 of 4"
    verdict = verify(path, workload, other=LatentWorkload.open_for(recording))
    assert verdict.ok
    assert not verdict.differs
    assert "slot" in verify(path, LatentWorkload.open_company(checkpoint, SLOTS)[1]).differs


def test_those_who_step_at_once_share_a_product() -> None:
    company, world = Company(make_world(), 3, gather_ms=2000), make_world()
    seats = [(torch.zeros(1, 2), torch.randn(1, 16), torch.zeros(1, 32)) for _ in range(3)]
    runs = []
    run, company._run = company._run, lambda: (runs.append(1), run())
    for slot, seat in enumerate(seats):
        company.sit(slot, *seat)
    expected = [z.clone() for _, z, _ in seats]
    both = threading.Barrier(3)

    def step(slot: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                both.wait()
                company.gather(slot)
                company.step(slot)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(step, range(3)))
    assert len(runs) <= 7  # five, and one or two where the first of all did not know yet whom to wait for
    with torch.inference_mode():
        for slot, (action, z, _) in enumerate(seats):
            h = world.predictor.initial(1)
            now = expected[slot]
            for _ in range(5):
                normal = (action.clamp(*map(torch.tensor, (SPEC.action_low, SPEC.action_high))) - world.action_mean) / (
                    world.action_std
                )
                now, h = world.predictor.advance(now, normal, h)
            torch.testing.assert_close(z, now, atol=1e-5, rtol=1e-5)


def test_a_failed_step_is_told_to_all_who_shared_it() -> None:
    company = Company(make_world(), 2, gather_ms=2000, timeout_s=5)
    for slot in range(2):
        company.sit(slot, torch.zeros(1, 2), torch.zeros(1, 16), torch.zeros(1, 32))
    company._seen = [float("inf")] * 2  # both are waited for
    run, company._run = company._run, lambda: 1 / 0

    def step(slot: int) -> str:
        try:
            company.gather(slot)
            company.step(slot)
        except (WorldlineError, ZeroDivisionError) as error:
            return type(error).__name__
        return "none"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(step, range(2))) == ["WorldlineError", "ZeroDivisionError"]
        company._run = run
        assert list(pool.map(step, range(2))) == ["none", "none"]


def test_one_that_never_comes_back_does_not_hang_the_others() -> None:
    company = Company(make_world(), 2, timeout_s=0.2)
    for slot in range(2):
        company.sit(slot, torch.zeros(1, 2), torch.zeros(1, 16), torch.zeros(1, 32))
    company.gather(0)  # and its thread dies here
    with pytest.raises(WorldlineError, match="did not come"):
        company.gather(1)


def test_one_draws_at_a_time_and_one_that_fails_lets_the_next_draw(checkpoint: Path) -> None:
    first, second = ({stage.name: stage.run for stage in w.stages} for w in LatentWorkload.open_company(checkpoint, 2))
    drawing = [name for name in first if name not in ("gather", "step", "turn")]
    assert drawing == ["decode", "gauge", "cycle"]
    with ThreadPoolExecutor(1) as pool:
        first["turn"]()
        turn = pool.submit(second["turn"])
        for name in drawing:
            assert not turn.done()
            first[name]()
        turn.result(timeout=10)
    for name in drawing:
        second[name]()

    one, other = LatentWorkload.open_company(checkpoint, 2)
    assert one._static is not None
    one._static.run["encode"] = lambda: 1 // 0
    for stage in one.stages[:-1]:
        stage.run()
    with pytest.raises(ZeroDivisionError):
        one.stages[-1].run()
    play(other, 0, 3)


def test_misuse_is_told(checkpoint: Path) -> None:
    with pytest.raises(WorldlineError, match="at least 2 slots"):
        Company(make_world(), 1)
    company = Company(make_world(), 2)
    company.sit(0, torch.zeros(1, 2), torch.zeros(1, 16), torch.zeros(1, 32))
    with pytest.raises(WorldlineError, match="taken"):
        company.sit(0, torch.zeros(1, 2), torch.zeros(1, 16), torch.zeros(1, 32))
    with pytest.raises(WorldlineError, match="has a transformer"):
        Company(World(WorldConfig(predictor="transformer"), SPEC).eval(), 2)
