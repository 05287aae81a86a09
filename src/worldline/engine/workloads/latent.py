"""Our own worlds as a frame loop: predict the next latent, gauge it, draw it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from worldline.core.devices import require_device
from worldline.core.errors import WorldlineError
from worldline.core.files import write_bytes
from worldline.core.seeding import rng_for, seed_for
from worldline.core.types import WorldSpec
from worldline.data.simulators import Observation, Simulator, make_simulator
from worldline.engine.recording import Recording
from worldline.engine.workload import Stage
from worldline.engine.workloads.company import Company
from worldline.engine.workloads.device_world import DeviceWorld, Dtype
from worldline.engine.workloads.static_world import StaticWorld, unsupported
from worldline.model.checkpoint import find_world, load_world, weights_sha256
from worldline.model.world import State, World

STARTS = "starts.safetensors"
Mode = Literal["auto", "eager", "graph", "compile"]
"""`eager` calls the world's own modules; `graph` replays, on a CPU, bound calls over memory that was laid out before
(`StaticWorld`), in half the time and with other rounding, and CUDA graphs on CUDA; `compile` calls what `torch.compile`
makes of the modules; `auto` is graph where there is one."""


@dataclass(frozen=True, kw_only=True)
class Starts:
    """Real beginnings that ship with a checkpoint: a session's seed picks one, modulo their number.

    A simulator reset with `seeds[i]` and led by `prefix[i, :prefix_lengths[i]]` shows `frames[i, 0]`, and then
    `frames[i, 1:]` under `actions[i]`, so that the true world can begin where the imagined one does.
    """

    frames: UInt8[np.ndarray, "n c h w 3"]
    actions: Float32[np.ndarray, "n cm1 a"]
    seeds: Int64[np.ndarray, " n"]
    prefix: Float32[np.ndarray, "n p a"]
    prefix_lengths: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.frames)

    def begin_truth(self, simulator: Simulator, seed: int) -> Observation:
        """Bring a simulator to the last context frame of the start that `seed` picks."""
        start = seed % len(self)
        observation = simulator.reset(int(self.seeds[start]))
        for action in (*self.prefix[start, : self.prefix_lengths[start]], *self.actions[start]):
            observation = simulator.step(action)
        return observation


def make_starts(
    simulator_name: str, context: int, count: int = 8, seed: int = 0, image_size: int | None = None
) -> Starts:
    """Play `count` starts with the simulator's own policy, on seeds of their own, that no training episode has.

    Pictures are `image_size` pixels square, or of the simulator's own size.

    Raises:
        WorldlineError: unknown simulator, or its package is not installed.
    """
    simulator = make_simulator(simulator_name, image_size)
    longest = 40
    frames, actions, prefix = [], [], np.zeros((count, longest, simulator.spec.action_dim), np.float32)
    lengths = rng_for(seed, "start-lengths").integers(10, longest + 1, count)
    seeds = np.array([seed_for(seed, "start", index) % 2**31 for index in range(count)], dtype=np.int64)
    for index in range(count):
        observation = simulator.reset(int(seeds[index]))
        policy = simulator.policy(int(seeds[index]))
        for step in range(lengths[index]):
            prefix[index, step] = policy(observation)
            observation = simulator.step(prefix[index, step])
        seen, done = [observation.frame], []
        for _ in range(context - 1):
            done.append(policy(observation))
            observation = simulator.step(done[-1])
            seen.append(observation.frame)
        frames.append(np.stack(seen))
        actions.append(np.array(done, dtype=np.float32).reshape(context - 1, simulator.spec.action_dim))
    return Starts(
        frames=np.stack(frames),
        actions=np.stack(actions),
        seeds=seeds,
        prefix=prefix,
        prefix_lengths=lengths.astype(np.int64),
    )


def save_starts(directory: str | Path, starts: Starts) -> Path:
    """Write `starts.safetensors` into a checkpoint's directory."""
    path = Path(directory) / STARTS
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(starts).items()}
    write_bytes(path, save(tensors))
    return path


def load_starts(directory: str | Path, spec: WorldSpec) -> Starts:
    """Read a checkpoint's starts.

    Raises:
        WorldlineError: there are none, or they do not fit the world.
    """
    path = Path(directory) / STARTS
    if not path.exists():
        raise WorldlineError(
            f"{path}: missing, so there is no real frame to begin from; "
            f"write it with: from worldline.checkpoints import add_starts; add_starts({str(directory)!r})"
        )
    try:
        starts = Starts(**{name: tensor.numpy() for name, tensor in load_file(path).items()})
    except (SafetensorError, TypeError) as error:
        raise WorldlineError(f"{path}: not a file of starts ({error}); write it again with save_starts") from None
    count, context = starts.frames.shape[:2] if starts.frames.ndim == 5 else (0, 0)
    expected = (count, context - 1, spec.action_dim)
    if count < 1 or starts.actions.shape != expected or starts.frames.dtype != np.uint8:
        raise WorldlineError(
            f"{path}: does not fit the world {spec.name!r}: frames {starts.frames.shape} {starts.frames.dtype} and "
            f"actions {starts.actions.shape}, expected uint8 (n, c, h, w, 3) and (n, c - 1, {spec.action_dim})"
        )
    return starts


class LatentWorkload:
    """A `World` played frame by frame, batch 1, on one CPU thread (a second one gains nothing at this size).

    An action beyond the spec's range is clipped to it, as the simulator clips it. The gauge reads `region` (the
    latent's radius) and, unless `cycle` is off, `cycle` (what is lost by drawing it and looking again, which costs an
    encoding a frame); both are relative to the 99% quantile over real frames. A world without a fitted gauge has none.

    On another device than a CPU, compiled, or in another precision, a frame has the stages of `DeviceWorld`.

    With a `seat`, a slot of a company, steps are taken together with the other sessions'; see `company.py`.
    """

    def __init__(
        self,
        world: World,
        starts: Starts,
        name: str = "",
        threads: int = 1,
        cycle: bool = True,
        mode: Mode = "auto",
        seat: tuple[Company, int] | None = None,
        device: str = "cpu",
        dtype: Dtype = "float32",
    ) -> None:
        require_device(device)
        self.world, self.starts, self.name, self.threads = world.to(device), starts, name, threads
        spec, size = world.spec, world.config.image_size
        if starts.frames.shape[2:] != (size, size, 3) or starts.actions.shape[2] != spec.action_dim:
            raise WorldlineError(
                f"starts of {starts.frames.shape[2:]} pixels and {starts.actions.shape[2]} action values do not fit "
                f"this world of ({size}, {size}, 3) and {spec.action_dim}"
            )
        self.fps = 1.0 / spec.step_seconds
        self.action = np.zeros(spec.action_dim, dtype=np.float32)
        self.frame = np.zeros((size, size, 3), dtype=np.uint8)
        cycle = cycle and world.gauge.fitted and float(world.gauge.cycle99) > 0
        self.gauge_names: tuple[str, ...] = (("region",) if world.gauge.fitted else ()) + (("cycle",) if cycle else ())
        self.gauge = np.zeros(len(self.gauge_names), dtype=np.float32)
        self.device, self.dtype = device, dtype
        static = device == "cpu" and dtype == "float32" and mode != "compile"
        has_graph = (not unsupported(world) and static) or device != "cpu"
        self.mode = mode if mode != "auto" else "graph" if has_graph else "eager"
        self._seat = seat
        self._low, self._high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
        self._action = torch.from_numpy(self.action)[None]
        self._frame = torch.from_numpy(self.frame)
        self._static = StaticWorld(world, self._action, self._frame) if self.mode == "graph" and static else None
        self._memory: tuple[Tensor, ...]
        if not static:
            self._play_on(DeviceWorld(world, self._begin(0), len(self.gauge_names), device, self.mode, dtype))
            return
        if self._static is not None:
            self._z, self._memory = self._static.z, (self._static.h,)
            self._readings = self._static.readings.numpy()
            runs = self._static.run["step"], self._static.run["decode"], self._static_region, self._static_cycle
            if seat is not None:
                seat[0].sit(seat[1], self._action, self._z, self._memory[0])
        else:
            state = self._begin(0)
            self._z = torch.zeros_like(state.z)
            self._memory = tuple(torch.zeros_like(part) for part in state.memory)
            runs = self._step, self._draw, self._region, self._cycle
        writes = tuple(self.state()), ("frame",), (), ()
        stages = zip(("step", "decode", "gauge", "cycle"), runs, writes, strict=True)
        allocates = self._static is None
        self.stages = tuple(Stage(*stage, allocates) for stage in stages)[: 2 + len(self.gauge_names)]
        self._drawing = self.stages[1:]
        if seat is not None:
            company, slot = seat
            together = (
                Stage("gather", lambda: company.gather(slot), allocates=False, waits=True),
                Stage("step", lambda: company.step(slot), tuple(self.state()), allocates=False, waits=True),
                Stage("turn", company.take_turn, allocates=False, waits=True),
            )
            self.stages = (*together, *_in_turn(company, self._drawing))

    @classmethod
    def open(
        cls, path_or_name: str | Path, mode: Mode = "auto", device: str = "cpu", dtype: Dtype = "float32"
    ) -> LatentWorkload:
        """Open a checkpoint with its starts, ready to play.

        Raises:
            WorldlineError: no such checkpoint, it has no starts, or its world has no graph and one was asked for.
        """
        directory = find_world(path_or_name)
        world = load_world(directory)
        starts = load_starts(directory, world.spec)
        return cls(world, starts, name=str(path_or_name), mode=mode, device=device, dtype=dtype)

    @classmethod
    def open_company(cls, path_or_name: str | Path, slots: int) -> list[LatentWorkload]:
        """Open a checkpoint for several sessions that step together; each workload wants a thread of its own.

        Raises:
            WorldlineError: no such checkpoint, it has no starts, or its world has no graph.
        """
        directory = find_world(path_or_name)
        world = load_world(directory)
        starts, company = load_starts(directory, world.spec), Company(world, slots)
        return [cls(world, starts, name=str(path_or_name), mode="graph", seat=(company, k)) for k in range(slots)]

    @classmethod
    def open_for(cls, recording: Recording, path_or_name: str | Path | None = None) -> LatentWorkload:
        """Open what a recording was made with, in its mode; another place of the checkpoint may be given.

        Raises:
            WorldlineError: as `open`.
        """
        made = recording.header.fingerprint
        place = path_or_name or made.get("checkpoint", "")
        if seat := re.fullmatch(r"(\d{1,3}) of (\d{1,3})", made.get("slot", "")):
            slot, slots = map(int, seat.groups())
            if slots > 1 and slot < slots:
                return cls.open_company(place, slots)[slot]
        mode = made.get("mode", "") if made.get("mode") in get_args(Mode) else "eager"
        dtype = made.get("dtype", "") if made.get("dtype") in get_args(Dtype) else "float32"
        device = "cpu" if made.get("device", "cpu") == "cpu" else "cuda"
        return cls.open(place, cast(Mode, mode), device, cast(Dtype, dtype))

    def reset(self, seed: int, prompt: str = "") -> None:
        if prompt:
            raise WorldlineError(f"this world takes no prompt, got {prompt!r}")
        self._set(self._begin(seed))

    def anchor(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        if self._static is not None:
            self.frame[...] = frame
            self._static.run["encode"]()
            z = self._static.seen
        else:
            z = self.world.encode(torch.tensor(frame, device=self.device)[None])
        self._set(self.world.observe(State(self._z, self._memory), z.to(self._z.device)))

    def state(self) -> dict[str, Tensor]:
        return {"z": self._z, **{f"memory.{index}": part for index, part in enumerate(self._memory)}}

    def fingerprint(self) -> dict[str, str]:
        config = {"world": self.world.config.to_json(), "spec": self.world.spec.to_json()}
        starts = hashlib.sha256()
        for name, value in vars(self.starts).items():
            starts.update(name.encode() + value.tobytes())
        return {
            "workload": "latent",
            "weights": weights_sha256(self.world),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "starts": starts.hexdigest(),
            "checkpoint": self.name,
            "device": self.device if self.device == "cpu" else torch.cuda.get_device_name(self.device),
            "dtype": self.dtype,
            "mode": self.mode,
            "threads": str(self.threads),
            **({"compiled": self.on_device.compiled} if self.mode == "compile" else {}),
            **({} if self._seat is None else {"slot": f"{self._seat[1]} of {self._seat[0].slots}"}),
            "torch": torch.__version__,
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "system": os.uname().sysname if hasattr(os, "uname") else platform.system(),
        }

    def _begin(self, seed: int) -> State:
        start = seed % len(self.starts)
        with torch.inference_mode():
            z = self.world.encode(torch.tensor(self.starts.frames[start], device=self.device))
            return self.world.begin(z[None], torch.tensor(self.starts.actions[start], device=self.device)[None])

    def _play_on(self, device: DeviceWorld) -> None:
        """Take buffers and stages from a device's."""
        self.on_device = device
        host = device.host
        self.action, self.frame, self.gauge = host["action"][0].numpy(), host["frame"].numpy(), host["readings"].numpy()
        self._z, *memory = (host[name] for name in device.state_names)
        self._memory = tuple(memory)
        self.stages = device.stages
        self._drawing = tuple(stage for stage in device.stages if stage.name != "step")

    def _set(self, state: State) -> None:
        self._z.copy_(state.z)
        for part, value in zip(self._memory, state.memory, strict=True):
            part.copy_(value)
        for stage in self._drawing:
            stage.run()

    def _step(self) -> None:
        action = torch.minimum(torch.maximum(self._action, self._low), self._high)
        state = self.world.step(State(self._z, self._memory), action)
        self._z.copy_(state.z)
        for part, value in zip(self._memory, state.memory, strict=True):
            part.copy_(value)

    def _draw(self) -> None:
        self._frame.copy_(self.world.decode(self._z)[0])

    def _region(self) -> None:
        self.gauge[0] = float(self.world.gauge.region(self._z)[0])

    def _static_region(self) -> None:
        assert self._static is not None
        self._static.run["region"]()
        self.gauge[0] = self._readings[0]

    def _static_cycle(self) -> None:
        assert self._static is not None
        self._static.run["encode"]()
        self._static.run["gap"]()
        self.gauge[1] = self._readings[1]

    def _cycle(self) -> None:
        gauge = self.world.gauge
        gap = (self.world.encode(self._frame[None]) - self._z) @ gauge.whitening
        self.gauge[1] = float(gap.norm() / gauge.cycle99)


def _in_turn(company: Company, drawing: tuple[Stage, ...]) -> list[Stage]:
    """Return the stages so that the turn ends with the last one, or with the first that fails."""

    def run_one(stage: Stage) -> None:
        try:
            stage.run()
        except BaseException:
            company.end_turn()
            raise
        if stage is drawing[-1]:
            company.end_turn()

    return [stage._replace(run=partial(run_one, stage)) for stage in drawing]
