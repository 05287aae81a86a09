"""A world in integers behind the interface of a `World`: an exported bundle, run by TinyEngine on this machine.

A bundle is data: the code that runs it is the package's own, and checks the program before it believes it.

Whatever takes a world takes this one: evaluation, planning, play. Latents and actions are the float world's; inside,
every one of them is a whole number of `scale`, so nothing is lost on the way in or out.

Shape legend: b batch, t steps, d latent, a action, e hidden, s state, h = w = image size.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, UInt8
from numpy.typing import NDArray
from torch import Tensor

from worldline.core.errors import WorldlineError
from worldline.core.files import read_json, sha256_file
from worldline.core.native import host_library
from worldline.model.world import State, World

MANIFEST, CHECKPOINT, PROGRAM = "manifest.json", "checkpoint", "world.bin"
FORMAT = "worldline-int8"
_ROW_ALIGN = 16
_STATUS = ("ok", "not a program", "of another version", "damaged", "impossible", "in want of a larger arena",
           "not ready for this call", "given a bad argument")  # fmt: skip


def is_bundle(path: str | Path) -> bool:
    """Return whether this is a folder that `worldline export` wrote."""
    return (Path(path) / MANIFEST).is_file()


class Program:
    """A program in memory, with the library that runs it: int16 in, int16 out.

    Raises:
        WorldlineError: a file is missing or damaged, or the library refuses the program.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        manifest = read_json(directory / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise WorldlineError(f"{directory}: not a bundle of worldline export")
        self.scale = float(manifest["scale"])
        if not (directory / PROGRAM).exists():
            raise WorldlineError(f"{directory / PROGRAM} is missing; copy the bundle again")
        found = sha256_file(directory / PROGRAM)
        if found != manifest["files"][PROGRAM]:
            raise WorldlineError(
                f"{directory / PROGRAM} is not the file that {MANIFEST} describes: expected SHA-256 "
                f"{manifest['files'][PROGRAM][:12]}..., got {found[:12]}...; copy it again"
            )
        self.sha256 = found
        self._library = ctypes.CDLL(str(host_library()))
        for name in ("handle_bytes", "latent_size", "action_size", "memory_size", "state_size"):
            getattr(self._library, f"tinyengine_{name}").restype = ctypes.c_size_t
        self._program = _aligned(np.fromfile(directory / PROGRAM, np.uint8))
        self._arena = _aligned(np.zeros(int(manifest["arena_bytes"]), np.uint8))
        self._handle = _aligned(np.zeros(self._library.tinyengine_handle_bytes(), np.uint8))
        sizes = (ctypes.c_size_t(part.size) for part in (self._program, self._arena))
        self._call("open", self._program, next(sizes), self._arena, next(sizes))
        self.latent, self.action, self.memory, self.state = (
            int(getattr(self._library, f"tinyengine_{name}_size")(_pointer(self._handle)))
            for name in ("latent", "action", "memory", "state")
        )

    def parts(self, states: Int16[np.ndarray, "b s"]) -> tuple[Int16[np.ndarray, "b d"], Int16[np.ndarray, "b e"]]:
        """Return views of the latents and of what is remembered in states."""
        behind = -(-self.latent // _ROW_ALIGN) * _ROW_ALIGN
        return states[:, : self.latent], states[:, behind : behind + self.memory]

    def encode(self, frames: UInt8[np.ndarray, "b h w 3"]) -> Int16[np.ndarray, "b d"]:
        frames = np.ascontiguousarray(frames)
        z = np.empty((len(frames), self.latent), np.int16)
        self._call("encode", frames, ctypes.c_size_t(frames.shape[1]), ctypes.c_size_t(len(frames)), z)
        return z

    def actions(self, native: Float32[np.ndarray, "b a"]) -> Int16[np.ndarray, "b a"]:
        """Return native actions as `step` takes them: clamped to their range, normalised, in whole numbers."""
        out = np.empty((len(native), self.action), np.int16)
        self._call("actions", np.ascontiguousarray(native, np.float32), ctypes.c_size_t(len(native)), out)
        return out

    def step(self, states: Int16[np.ndarray, "b s"], actions: Int16[np.ndarray, "b a"]) -> None:
        """Put every state one step on, in place."""
        self._call("step", states, np.ascontiguousarray(actions), ctypes.c_size_t(len(states)))

    def decode(self, z: Int16[np.ndarray, "b d"], out: UInt8[np.ndarray, "b h w 3"]) -> None:
        self._call("decode", np.ascontiguousarray(z), ctypes.c_size_t(len(z)), out)

    def region(self, z: Int16[np.ndarray, "1 d"]) -> int:
        """Return how far a latent is from the mean of real ones, in 1/256 of what 99% of these keep within."""
        out = np.empty(1, np.uint32)
        self._call("region", np.ascontiguousarray(z), out)
        return int(out[0])

    def _call(self, name: str, *arguments: Any) -> None:
        given = (_pointer(a) if isinstance(a, np.ndarray) else a for a in arguments)
        status = getattr(self._library, f"tinyengine_{name}")(_pointer(self._handle), *given) & 0xFF
        if status:
            raise WorldlineError(f"TinyEngine: {name}: the program is {_STATUS[status]}")


class Int8World(World):
    """A world whose methods are computed in integers. It has no gradients, and `gauge` is the float world's."""

    def __init__(self, world: World, program: Program) -> None:
        super().__init__(world.config, world.spec)
        self.load_state_dict(world.state_dict(), strict=False)
        self.gauge = world.gauge
        self.program = program
        self.eval().requires_grad_(False)

    @classmethod
    def open(cls, directory: str | Path, world: World) -> Int8World:
        """Open a bundle; `world` is the one it was made from.

        Raises:
            WorldlineError: it is incomplete or damaged, or there is no C++ compiler.
        """
        return cls(world, Program(directory))

    def encode(self, frames: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b d"]:
        flat = frames.reshape(-1, *frames.shape[-3:])
        z = torch.from_numpy(self.program.encode(flat.cpu().numpy())).float() * self.program.scale
        return z.reshape(*frames.shape[:-3], self.config.latent_dim)

    def step(self, state: State, action: Float[Tensor, "b a"]) -> State:
        states = np.zeros((len(state.z), self.program.state), np.int16)
        z, h = self.program.parts(states)
        z[...], h[...] = self._whole(state.z), state.memory[0].numpy()
        self.normalise_actions(action)  # refuses those of another length
        self.program.step(states, self.program.actions(action.float().cpu().numpy()))
        return State(torch.from_numpy(z).float() * self.program.scale, (torch.from_numpy(h).float(),))

    def teacher_forced(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        state, predictions = State(z[:, 0], self.predictor.initial(len(z))), []
        for t in range(z.shape[1]):
            state = self.step(self.observe(state, z[:, t]), actions[:, t])
            predictions.append(state.z)
        return torch.stack(predictions, dim=1)

    def decode(self, z: Float[Tensor, "*b d"]) -> UInt8[Tensor, "*b h w 3"]:
        self._require_latents(z)
        flat = self._whole(z.reshape(-1, self.config.latent_dim))
        size = self.config.image_size
        out = np.empty((len(flat), size, size, 3), np.uint8)
        self.program.decode(flat, out)
        return torch.from_numpy(out).reshape(*z.shape[:-1], size, size, 3)

    def _whole(self, x: Float[Tensor, "b n"]) -> NDArray[np.int16]:
        """Return values as whole numbers of the scale."""
        return (x.double() / self.program.scale).round().clamp(-32768, 32767).to(torch.int16).cpu().numpy()


def _aligned(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    room = np.zeros(values.size + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + values.size] = values
    return room[start : start + values.size]


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
