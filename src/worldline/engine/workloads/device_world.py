"""A world on a device of its own: static buffers there, staging in host memory, a frame in five stages.

`h2d` sends the action and the state, `step`, `decode` and `gauge` run on the device, `d2h` fetches state, picture and
readings and waits for them: the only wait of a frame. The state lives in host memory between frames, two kilobytes that
the engine hashes there anyway. On CUDA the host's buffers are pinned, and with `mode=graph` each of the three inner
stages is a captured graph. The same code runs on a CPU, with nothing to pin or capture.

Shape legend: d latent, a action, g readings.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.engine.workload import Stage
from worldline.model.world import State, World

Dtype = Literal["float32", "bfloat16", "float16"]
INNER = ("step", "decode", "gauge")
_WARM_UP = 3  # calls before a capture: libraries are loaded and their workspaces taken


class DeviceWorld:
    """Buffers and stages of a world that lies on `device` already, batch 1.

    `host` and `device` hold the same names: action (1, a), z (1, d), memory.0 and so on, frame (h, w, 3) and readings
    (g,). Products run in `dtype`; state and readings are float32.

    Raises:
        WorldlineError: the mode or the precision does not go with the device.
    """

    def __init__(self, world: World, state: State, readings: int, device: str, mode: str, dtype: Dtype) -> None:
        cuda = torch.device(device).type == "cuda"
        if dtype != "float32" and not cuda:
            raise WorldlineError(f"dtype={dtype} is for device=cuda: on a CPU one row in half precision is slower")
        if mode == "compile" and not cuda and not any(map(shutil.which, ("g++", "clang++"))):
            raise WorldlineError("mode=compile on a CPU needs a C++ compiler: apt-get install g++, or give mode=eager")
        self.world = world
        size = world.config.image_size
        shapes: dict[str, Tensor] = {"action": torch.zeros(1, world.spec.action_dim), "z": state.z}
        shapes |= {f"memory.{number}": part for number, part in enumerate(state.memory)}
        shapes |= {"frame": torch.zeros(size, size, 3, dtype=torch.uint8), "readings": torch.zeros(readings)}
        self.host: dict[str, Tensor] = {
            name: torch.zeros(like.shape, dtype=like.dtype, pin_memory=cuda) for name, like in shapes.items()
        }
        self.device: dict[str, Tensor] = {
            name: torch.zeros(like.shape, dtype=like.dtype, device=device) for name, like in shapes.items()
        }
        self.state_names = tuple(name for name in shapes if name == "z" or name.startswith("memory."))
        self.spans_ns: dict[str, int] = {}
        """How long the device took for each stage of the last frame, by its own clock; CUDA only."""
        self._low, self._high = (
            torch.tensor(bound, device=device) for bound in (world.spec.action_low, world.spec.action_high)
        )
        self._precision = {"device_type": device, "dtype": getattr(torch, dtype), "enabled": dtype != "float32"}
        wrap: Callable[..., Any] = torch.compile if mode == "compile" else lambda function: function
        self._pure = {name: wrap(getattr(self, f"_pure_{name}")) for name in INNER}
        runs: dict[str, Callable[[], None]] = {name: getattr(self, f"_{name}") for name in INNER}
        with torch.inference_mode():
            for run in [*runs.values()] * _WARM_UP if cuda or mode == "compile" else []:
                run()
            if mode == "graph":
                runs = {name: _captured(run) for name, run in runs.items()}
        self.compiled = _compiled_key() if mode == "compile" else ""
        """What `torch.compile` made; equal keys, equal kernels."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(6)] if cuda else []
        self._marks: list[tuple[str, torch.cuda.Event]] = []  # of the frame at work: a reset has no step
        parts = {"h2d": self._send, **runs, "d2h": self._fetch}
        writes = {"step": self.state_names, "decode": ("frame",)}
        self.stages = tuple(
            Stage(
                name,
                self._timed(name, number, run),
                writes.get(name, ()),
                allocates=mode != "graph",
                waits=name == "d2h",
            )
            for number, (name, run) in enumerate(parts.items())
        )

    def _send(self) -> None:
        for name in ("action", *self.state_names):
            self.device[name].copy_(self.host[name], non_blocking=True)

    def _fetch(self) -> None:
        for name in (*self.state_names, "frame", "readings"):
            self.host[name].copy_(self.device[name], non_blocking=True)
        if self._events:
            self._events[5].record()
            self._events[5].synchronize()
            pairs = pairwise([*self._marks, ("", self._events[5])])
            self.spans_ns = {name: round(a.elapsed_time(b) * 1e6) for (name, a), (_, b) in pairs}
            self._marks.clear()

    def _timed(self, name: str, number: int, run: Callable[[], None]) -> Callable[[], None]:
        """Let the device's clock and a profiler see a stage under its name."""
        if not self._events:
            return run
        event, nvtx = self._events[number], torch.cuda.nvtx

        def timed() -> None:
            event.record()
            self._marks.append((name, event))
            nvtx.range_push(name)
            run()
            nvtx.range_pop()

        return timed

    def _step(self) -> None:
        state = [self.device[name] for name in self.state_names]
        for place, value in zip(state, self._pure["step"](self.device["action"], *state), strict=True):
            place.copy_(value)

    def _decode(self) -> None:
        self.device["frame"].copy_(self._pure["decode"](self.device["z"]))

    def _gauge(self) -> None:
        if readings := len(self.device["readings"]):
            self.device["readings"].copy_(self._pure["gauge"](self.device["z"], self.device["frame"])[:readings])

    def _pure_step(self, action: Tensor, z: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(**self._precision):
            state = self.world.step(State(z, memory), torch.minimum(torch.maximum(action, self._low), self._high))
        return state.z, *state.memory

    def _pure_decode(self, z: Tensor) -> Tensor:
        with torch.autocast(**self._precision):
            return self.world.decode(z)[0]

    def _pure_gauge(self, z: Tensor, frame: Tensor) -> Tensor:
        """Return region and cycle; without asking whether the gauge is fitted, which would wait for the device."""
        gauge = self.world.gauge
        with torch.autocast(**self._precision):
            seen = self.world.encode(frame[None]).float()
        gap = torch.linalg.vector_norm((seen - z) @ gauge.whitening, dim=-1)
        return torch.cat((gauge.radius(z) / gauge.radius99, gap / gauge.cycle99))


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of what `run` does on the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _compiled_key() -> str:
    """Return a hash of the compile-cache keys of all that this process has compiled, autotuning included.

    The keys cover the graphs, the compiler's settings, torch's version and the device; they do not depend on whether
    the kernels came from the cache.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return "unknown: the compile cache is switched off"
    keys = sorted(f"{kind} {key}" for kind, found in saved[1].artifacts.items() for key in found)
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
