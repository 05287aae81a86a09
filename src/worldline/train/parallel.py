"""How a model is spread over ranks: applied to it from outside, in one order.

Started as a plain process there is one rank and no process group; `torchrun` and Ray Train say by the environment how
many there are. Everything here does the same work on one rank as on many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

from worldline.core.errors import WorldlineError, require_at_least
from worldline.model.transformer import Block

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the same updates are computed; none of it changes them but by rounding."""

    checkpointing: bool = False
    """Keep only the blocks' inputs for the backward pass, and compute the rest of each again there."""
    compile: bool = False
    """Compile every block (torch.compile); needs a C++ compiler, and minutes at the start."""
    offload: bool = False
    """Keep parameters, gradients and optimiser in CPU memory between their uses; needs torchrun, for one GPU too."""
    accumulate: int = 1
    """Parts that a rank's share of a batch is computed in, one after the other; with learner.target=ema only, since
    SIGReg is of all clips of a batch together."""

    def __post_init__(self) -> None:
        require_at_least(self, {"accumulate": 1}, "parallel.")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    count: int
    mesh: DeviceMesh | None
    """None for a plain process."""
    background: dist.ProcessGroup | None
    """A group of its own for checkpoints, whose messages cross those of training in any order."""

    def gather(self, item: Item) -> list[Item]:
        """Return the items of all ranks to every rank."""
        if self.count == 1:
            return [item]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, item)
        return found

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            self.gather(None)


@contextmanager
def open_ranks(device: Literal["cpu", "cuda"]) -> Iterator[Ranks]:
    """Find out which rank this process is, and join the others.

    A process group that is there already, Ray Train's for example, is used and left as it is.
    """
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, None, None)
        return
    ours = not dist.is_initialized()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ours:
        store, rank, count = next(rendezvous("env://"))
        # torchrun may lend the same store to ranks that it starts again: gloo would find the dead ones' addresses there
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=count)
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("shard",))
    background = dist.new_group(backend="gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), mesh, background)
    finally:
        if ours:
            dist.destroy_process_group()


def parallelize(
    model: nn.Module, mesh: DeviceMesh | None, config: ParallelConfig, *, device: str, bfloat16: bool
) -> nn.Module:
    """Checkpoint, compile and shard every block, in this order, then shard what is left around them.

    Weights stay float32 where they are kept and updated. With `bfloat16` they are gathered in that type, gradients are
    added up over ranks in float32, and the caller computes under autocast.

    Raises:
        WorldlineError: offloading was asked for in a plain process.
    """
    if config.offload and mesh is None:
        raise WorldlineError(
            "parallel.offload needs a process group; start with torchrun --nproc-per-node=1 -m worldline"
        )
    units = []
    for parent in list(model.modules()):
        for name, unit in list(parent.named_children()):
            if isinstance(unit, Block):
                wrapped: nn.Module = unit
                if config.checkpointing:
                    wrapped = checkpoint_wrapper(wrapped, preserve_rng_state=False)
                if config.compile:
                    wrapped = cast(nn.Module, torch.compile(wrapped))
                setattr(parent, name, wrapped)
                units.append(wrapped)
    if mesh is None:
        return _to(model, device)
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = CPUOffloadPolicy(pin_memory=device == "cuda") if config.offload else OffloadPolicy()
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=policy)
    return _to(model, device)  # the buffers; weights are there already


def _to(model: nn.Module, device: str) -> nn.Module:
    return model if device == "cpu" else model.to(device)  # on tensors without bytes `to` fails


def synchronise_gradients(model: nn.Module, wanted: bool) -> None:
    """Let the next backward passes add gradients up over ranks, or only on this one, until the last of a batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank holds; a plain tensor is all here."""
    return tensor.to_local() if isinstance(tensor, dist.tensor.DTensor) else tensor


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights towards the present ones, each rank its own part."""
    slow = [local(p) for p in average.parameters()]
    torch._foreach_lerp_(slow, [local(p.detach()) for p in model.parameters()], 1.0 - decay)
