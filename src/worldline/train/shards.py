"""Checkpoints that every rank writes its part of, and that any number of ranks can read.

RUN/checkpoints/STEP/   what torch.distributed.checkpoint writes: a file a rank, and `.metadata` once all are whole
RUN/last                a link to the last checkpoint that is whole; it alone decides what a run resumes from
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.utils._pytree import tree_map_only

from worldline.core.errors import WorldlineError
from worldline.core.files import fsync_directory
from worldline.train.parallel import Ranks


class Shards:
    """The checkpoints of a run; written in the background, one at a time."""

    def __init__(self, run: Path, ranks: Ranks) -> None:
        self._run, self._ranks = run, ranks
        self._writing: tuple[int, Future[Any]] | None = None
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, step: int, models: dict[str, Any], optimizer: Any) -> None:
        """Copy the state and write it while training goes on; waits for the checkpoint before it.

        `models` and the optimiser's parameters are named without what checkpointing and compilation wrap around them.
        """
        self.finish()
        state, place = _state(models, optimizer), self._place(step)
        if self._ranks.mesh is None:
            copied = tree_map_only(Tensor, Tensor.clone, state)
            self._writing = (step, self._alone.submit(_save_alone, copied, place))
            return
        written = async_save(state, checkpoint_id=place, process_group=self._ranks.background)
        assert isinstance(written, Future)
        self._writing = (step, written)

    def poll(self) -> None:
        """Point `last` at the checkpoint that is being written if it has become whole."""
        if self._writing is not None and self._writing[1].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written and point `last` at it.

        Rank 0 waits until every rank's file is whole: its own part of the write ends with the metadata of all.

        Raises:
            WorldlineError: it could not be written, by any rank.
        """
        if self._writing is None:
            return
        step, written = self._writing
        self._writing = None
        try:
            written.result()
        except CheckpointException as error:
            cause = _cause(error)
            if not isinstance(cause, (OSError, RuntimeError)):
                raise cause from None
            raise WorldlineError(
                f"{self._place(step)} could not be written ({_line(cause)}); make room and give the same command "
                "again: it goes on from the checkpoint before"
            ) from None
        if self._ranks.rank == 0:
            self._point(step)

    def load(self, models: dict[str, Any], optimizer: Any) -> int:
        """Put back the last whole checkpoint, whatever number of ranks wrote it; return its step, 0 without one.

        Raises:
            WorldlineError: its files are damaged.
        """
        step = int(os.readlink(self._run / "last").rsplit("/", 1)[-1]) if (self._run / "last").is_symlink() else 0
        self._ranks.wait()  # all have read the link before rank 0 may change anything
        if self._ranks.rank == 0:
            self._sweep(step)
        if step == 0:
            return 0
        state = _state(models, optimizer)
        try:
            with _no_ranks():
                load(state, checkpoint_id=self._place(step), no_dist=self._ranks.mesh is None)
        except (OSError, CheckpointException) as error:
            if not isinstance(cause := _cause(error), Exception):
                raise cause from None  # Ctrl-C
            raise WorldlineError(
                f"{self._place(step)} is damaged ({_line(cause)}); start again with another path="
            ) from None
        parameters = state.pop("optimizer")
        for name, model in models.items():
            own = name == "model"
            set_state_dict(
                model,
                optimizer if own else (),
                model_state_dict=state[name],
                optim_state_dict=parameters if own else {},
            )
        return step

    def _place(self, step: int) -> Path:
        return self._run / "checkpoints" / f"{step:08d}"

    def _point(self, step: int) -> None:
        for file in self._place(step).iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        fsync_directory(self._place(step))
        temporary = self._run / ".last.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"checkpoints/{step:08d}")
        os.replace(temporary, self._run / "last")
        fsync_directory(self._run)
        self._sweep(step)

    def _sweep(self, step: int) -> None:
        """Remove every checkpoint but one: older ones, and what a killed process left half written."""
        if (self._run / "checkpoints").is_dir():
            for entry in (self._run / "checkpoints").iterdir():
                if entry.name != f"{step:08d}":
                    shutil.rmtree(entry)


def _state(models: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, model in models.items():
        weights, parameters = get_state_dict(model, optimizer if name == "model" else ())
        state[name] = weights
        if name == "model":
            state["optimizer"] = parameters
    return state


def _cause(error: BaseException) -> BaseException:
    """Return what a checkpoint failed of; of several ranks, the first that did."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _save_alone(state: dict[str, Any], place: Path) -> None:
    with _no_ranks():
        save(state, checkpoint_id=place, no_dist=True)


@contextmanager
def _no_ranks() -> Iterator[None]:
    """Let a plain process be one without a warning that it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
