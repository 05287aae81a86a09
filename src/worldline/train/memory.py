"""How much memory a rank of a masked pre-training needs: its updates done on tensors that have shapes and no bytes.

What is counted is every byte that a tensor of the rank holds, at the worst moment of an update. What a GPU adds, its
context, the libraries' workspaces, and holes between blocks, is not: that is what `reserve_gb` is for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldline.core.errors import WorldlineError, require_at_least
from worldline.core.progress import progress
from worldline.model.video import VideoConfig
from worldline.train.feed import Batch
from worldline.train.learner import Learner, LearnerConfig
from worldline.train.masks import MaskConfig
from worldline.train.parallel import ParallelConfig, Ranks, local

GB = 1e9
LARGEST = 1024
"""Clips a rank beyond which nobody looks."""
_FIRST = 16
"""Clips a rank that are tried first: beyond one, so many that what grows with them tells the slope."""


@dataclass(frozen=True, kw_only=True)
class PlanMemoryConfig:
    """A model and the GPUs that it shall be pre-trained on."""

    model: VideoConfig = field(default_factory=VideoConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    gpus: int = 4
    """Ranks that parameters, gradients and optimiser are spread over."""
    memory_gb: float = 24.0
    """Memory of each, 1e9 bytes."""
    reserve_gb: float = 2.0
    """Kept free for what no tensor holds: context, workspaces, communication, holes. Assumed, not measured."""
    out: Path | None = None
    """A folder for what was found, result.json and report.md; null only prints it."""

    def __post_init__(self) -> None:
        require_at_least(self, {"gpus": 1})
        if not 0.0 <= self.reserve_gb < self.memory_gb:
            raise WorldlineError(f"reserve_gb must be less than memory_gb {self.memory_gb:g}, got {self.reserve_gb:g}")


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one rank at the worst moment of an update."""

    parameters: int
    """Float32 weights, this rank's part, the averaged encoder's apart."""
    average: int
    optimizer: int
    gradients: int
    gathered: int
    """Weights of the blocks at work, whole."""
    activations: int
    """All else: what the backward pass wants, and what an operation needs while it runs."""

    @property
    def total(self) -> int:
        return self.kept + self.gathered + self.activations

    @property
    def kept(self) -> int:
        """What offloading moves to the host."""
        return self.parameters + self.average + self.optimizer + self.gradients

    def on_device(self, offload: bool) -> int:
        return self.total - (self.kept if offload else 0)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings, and the most clips a rank that fit with them; 0 if not even one does."""

    checkpointing: bool
    offload: bool
    clips: int
    need: Need
    """With that many clips, or with one if none fits."""


def plan_memory(config: PlanMemoryConfig) -> list[Choice]:
    """Find the most clips a rank that fit into memory, with and without checkpointing and offloading."""
    room = (config.memory_gb - config.reserve_gb) * GB
    found = []
    with progress("plan-memory", 4) as task:

        def noted(measure: Callable[[int], Need], words: str) -> Callable[[int], Need]:
            def need(clips: int) -> Need:
                task.advance(0, f"{words}: {clips} clips")
                return measure(clips)

            return cache(need)

        for checkpointing in (False, True):
            parallel = ParallelConfig(checkpointing=checkpointing)
            with measuring(config.model, config.mask, config.learner, parallel, config.gpus) as measure:
                need = noted(measure, "with checkpointing" if checkpointing else "without checkpointing")
                for offload in (False, True):
                    clips = _most(need, offload, room)
                    choice = Choice(checkpointing=checkpointing, offload=offload, clips=clips, need=need(max(1, clips)))
                    found.append(choice)
                    task.advance()
    return found


def _most(need: Callable[[int], Need], offload: bool, room: float) -> int:
    """Return the most clips that fit, to one or a thirtieth: bytes grow nearly evenly, so that lines lead there."""

    def size(clips: int) -> int:
        return need(clips).on_device(offload)

    if size(1) > room:
        return 0
    fits, too_many, guess = 1, LARGEST + 1, _FIRST
    while too_many - fits > max(1, fits // 32):
        slope = (size(guess) - size(fits)) / (guess - fits)
        if size(guess) <= room:
            fits = guess
        else:
            too_many = guess
        more = int((room - size(fits)) / max(1.0, slope))
        if more < max(1, fits // 32):
            break
        guess = min(fits + more, too_many - 1)
    return fits


@contextmanager
def measuring(
    model: VideoConfig, mask: MaskConfig, learner: LearnerConfig, parallel: ParallelConfig, ranks: int
) -> Iterator[Callable[[int], Need]]:
    """Be one rank of several, on tensors without bytes, and yield what tells its need by the number of clips: each time
    it does an update, by the very code that trains, and counts.

    Raises:
        WorldlineError: this process belongs to a process group already.
    """
    with _pretended(ranks) as us, FakeTensorMode(allow_non_fake_inputs=True):
        learning = Learner(model, mask, learner, parallel, us, seed=0, device="cpu")

        def batch(clips: int) -> Batch:
            pictures = torch.zeros((clips, model.frames, model.image_size, model.image_size, 3), dtype=torch.uint8)
            return Batch(0, np.arange(clips), pictures, torch.ones(clips), lost=())

        learning.update(batch(1))  # the first makes what stays: the optimiser's state
        yield lambda clips: _count_update(learning, batch(clips))


def _count_update(learning: Learner, batch: Batch) -> Need:
    """Do an update and return what it held at its worst moment."""
    with Counter() as counter:
        counter.own("parameters", learning.model.parameters())
        counter.own("average", [] if learning.target is None else learning.target.parameters())
        states = learning.optimizer.state.values()
        counter.own("optimizer", [value for state in states for value in state.values()])
        counter.own("activations", [batch.clips, batch.weight, *learning.model.buffers()])
        if learning.target is not None:
            counter.own("activations", learning.target.buffers())
        with counter.gradients_of(learning.model):
            learning.update(batch)
    return Need(**counter.worst)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all tensors that are alive, by what they are for, and remember the worst moment."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        names = ("parameters", "average", "optimizer", "gradients", "gathered", "activations")
        self.now = dict.fromkeys(names, 0)
        self.worst = dict(self.now)
        self._most = 0
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __enter__(self) -> Counter:
        self._resize = torch.UntypedStorage.resize_
        counter = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP lets go of gathered weights
            done = counter._resize(storage, size)
            counter._set("gathered", storage)
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again for the tensors inside
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._alive:
                self._set("activations", leaf.untyped_storage())
        return result

    def own(self, name: str, tensors: Any) -> None:
        """Count tensors that were there before, or count known ones under another name."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._set(name, local(tensor.detach()).untyped_storage())

    @contextmanager
    def gradients_of(self, model: nn.Module) -> Iterator[None]:
        """Know gradients by their parameters, as soon as they are there."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.own("gradients", [parameter.grad])

        hooks = [
            p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            for p in model.parameters()
        ]
        yield
        for hook in hooks:
            hook.remove()

    def _set(self, name: str, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            _, before, size = self._alive[key]
            self.now[before] -= size
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._forget(key)), name, size)
        self.now[name] += size
        if (total := sum(self.now.values())) > self._most:
            self._most, self.worst = total, dict(self.now)

    def _forget(self, key: int) -> None:
        _, name, size = self._alive.pop(key)
        self.now[name] -= size


@contextmanager
def _pretended(count: int) -> Iterator[Ranks]:
    """Be the first of several ranks that are not there."""
    if count == 1:
        yield Ranks(0, 1, None, None)
        return
    if dist.is_initialized():
        raise WorldlineError("memory is planned in a process of its own, not in one of several ranks")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield Ranks(0, count, init_device_mesh("cpu", (count,)), None)
    finally:
        dist.destroy_process_group()
