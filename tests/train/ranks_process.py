"""One rank of the tests: `python ranks_process.py RUN OUT [STEP RANK]...`, under torchrun or alone.

Writes into OUT what the first batch's gradients are and what an update holds in memory, then pre-trains into RUN. Each
STEP RANK is a place at which that rank kills itself, once.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy_clips import ToyClips, toy_config

from worldline.core.files import write_json
from worldline.data.order import Order
from worldline.train import pretrain as module
from worldline.train.feed import Batch
from worldline.train.learner import Learner
from worldline.train.parallel import ParallelConfig, Ranks, local, open_ranks
from worldline.train.pretrain import PretrainConfig, pretrain

WAYS: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "ema": (ParallelConfig(), {}),
    "accumulated": (ParallelConfig(accumulate=2, checkpointing=True), {}),
    "offloaded": (ParallelConfig(offload=True), {}),
    "sigreg": (ParallelConfig(), {"target": "sigreg"}),
    "bfloat16": (ParallelConfig(), {"bfloat16": True}),
}


def learner_and_batch(config: PretrainConfig, ranks: Ranks) -> tuple[Learner, Batch]:
    ids = Order(ToyClips.num_clips, config.batch, config.seed).share(0, ranks.rank, ranks.count)
    learner = Learner(config.model, config.mask, config.learner, config.parallel, ranks, seed=3, device="cpu")
    return learner, Batch(0, ids, torch.from_numpy(ToyClips().read(ids)), torch.ones(len(ids)), ())


def first_gradients(ranks: Ranks) -> dict[str, np.ndarray]:
    """Return the whole gradient of every way, as one row each."""
    found = {}
    for name, (parallel, options) in WAYS.items():
        if parallel.offload and ranks.mesh is None:
            continue
        learner, batch = learner_and_batch(toy_config(Path("none"), parallel=parallel, **options), ranks)
        learner.gradients(batch)
        gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        found[name] = torch.cat([g.flatten() for g in whole]).numpy()
    return found


def allocated(learner: Learner, batch: Batch) -> int:
    """Return the most bytes that an update holds, by the account of torch's allocator and not by ours."""
    from torch.profiler import ProfilerActivity, profile

    learner.update(batch)
    models = [learner.model] + ([] if learner.target is None else [learner.target])
    kept = [local(p) for model in models for p in (*model.parameters(), *model.buffers())]
    kept += [local(value) for state in learner.optimizer.state.values() for value in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner.update(batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return sum(tensor.nbytes for tensor in kept) + batch.clips.nbytes + int(changes.max())


def die_at(places: list[tuple[int, int]], markers: Path) -> None:
    original = Learner.update

    def update(self: Learner, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        for step, rank in places:
            marker = markers / f"{step}-{rank}.killed"
            if batch.step == step - 1 and not marker.exists():
                time.sleep(2.0)  # the checkpoint that is being written becomes whole, also on a busy machine
            if batch.step == step and int(os.environ.get("RANK", "0")) == rank and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)

    Learner.update = update  # type: ignore[method-assign]


if __name__ == "__main__":
    run, out, *rest = sys.argv[1:]
    numbers = [int(word) for word in rest]
    module.open_clips = lambda path: ToyClips()  # type: ignore[assignment]
    with open_ranks("cpu") as ranks:  # which `pretrain` then finds there, as under Ray Train
        if ranks.count == 2 and not (Path(out) / "gradients.npz").exists():
            found = first_gradients(ranks)
            measured = allocated(*learner_and_batch(toy_config(Path("none"), warmup=5), ranks))
            if ranks.rank == 0:
                write_json(Path(out) / "allocated.json", measured)
                np.savez(Path(out) / "gradients.npz", **found)
        die_at(list(zip(numbers[::2], numbers[1::2], strict=True)), Path(out))
        pretrain(toy_config(Path(run)))
